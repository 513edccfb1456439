"""The durable state of a job: its record in a database, and files beside it."""
