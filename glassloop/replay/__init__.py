"""A recorded update carried out again, on one process: does it come out as recorded, what in it stands out, and what would have changed it."""
