"""A worker of a simulation: a process that holds torch and the data, and trains one client at a time."""
