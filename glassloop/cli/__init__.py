"""One file a command.

Each imports what it needs inside its functions, so that `glassloop --help` stays quick.
May import everything; nobody imports it.
"""
