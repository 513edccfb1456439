"""The agent of one device and the trainer it starts."""
