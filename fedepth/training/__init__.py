"""The depth-wise trainer: stages, cached prefix outputs, optimizers."""
