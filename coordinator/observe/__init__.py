"""What people see of a job: events and logs."""
