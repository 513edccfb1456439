"""The durable state of a job: a SQLite record, and files beside it."""
