"""How fast updates are, and what they cost: arms in fresh processes, a matrix of them, tables, comparisons, one line for a card."""
