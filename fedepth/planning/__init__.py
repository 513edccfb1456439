"""From unit costs and a budget to a block plan: pure functions, no torch, no numpy."""
