"""The check of image files: a child of the agent that holds PIL and numpy."""
