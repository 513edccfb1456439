"""The device's certificate: a child of the agent makes keys and reads certificates, for which it holds a library."""
