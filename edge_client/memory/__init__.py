"""What this device sees of its memory, and the budgets that follow."""
