"""What `glassloop doctor` checks on a machine, and what known error messages mean."""
