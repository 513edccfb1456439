"""Averaging partial updates per parameter, tensor by tensor from files."""
