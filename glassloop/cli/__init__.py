"""One file a command; each imports what it needs inside its functions, so that `glassloop --help` stays quick."""
