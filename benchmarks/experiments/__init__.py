"""What depth-wise training is worth, and whether the simulator agrees with another one. See `__main__`."""
