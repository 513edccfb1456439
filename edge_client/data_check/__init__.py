"""The check of image files and rows: a child of the agent that holds PIL and numpy."""
