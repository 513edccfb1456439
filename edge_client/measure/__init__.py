"""What is measured on this device by training: its calibration, and what it is capable of."""
