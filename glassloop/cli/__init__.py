"""One file a command.

Each imports what it needs inside its functions, so that `glassloop --help` stays quick.
"""
