"""Many agents and many strangers against one coordinator."""
