"""Imports without searches for garbage; import it before everything else.

What is imported stays until the process ends. Python searches it for garbage all the same: dozens
of times while more is imported, and then again in every large search of the run. Neither happens in
a process that begins with this module. Where torch is imported already, somebody else owns the
process, and nothing changes.
"""

from __future__ import annotations

import gc
import sys

OWNED = gc.isenabled() and "torch" not in sys.modules

if OWNED:
    gc.disable()


def end_of_imports() -> None:
    """Search for garbage from here on, but not among what is imported."""
    if OWNED:
        gc.freeze()
        gc.enable()
