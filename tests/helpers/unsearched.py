"""No search for garbage while libraries are imported and tests are collected.

They are 700,000 objects that stay. A search among them takes 0.3 s, and there would be hundreds.
`begin_searches` leaves them out of all that follow.
"""

from __future__ import annotations

import gc

gc.disable()


def begin_searches() -> None:
    """Search from here on, among newer objects alone."""
    gc.freeze()
    gc.enable()
