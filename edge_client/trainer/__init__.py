"""The trainer: a child of the agent that trains one task at a time, inside its budget."""
