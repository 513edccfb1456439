"""The coordinator: a job, its rounds, the global weights and the record of every device."""
