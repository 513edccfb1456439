"""Predicting what a stage needs, and metering what a process really used."""
