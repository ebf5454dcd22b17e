"""A run's folder, seen: one page that opens offline, two runs beside each other, a live view. Never imports torch."""
