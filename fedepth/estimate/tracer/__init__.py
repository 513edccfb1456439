"""Tracing in a child process."""
