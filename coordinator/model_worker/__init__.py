"""The model worker: a child of the coordinator that holds torch."""
