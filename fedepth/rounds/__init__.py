"""The rounds of a job without I/O: a coordinator plays them with devices and a clock, a simulation with neither."""
