"""The wire format: messages, chunk streams, channels and status codes."""
