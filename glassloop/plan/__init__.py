"""What `glassloop plan` says: step math, changes, counts of rows and tokens, and how it is written. Torch only where tokens are counted."""
