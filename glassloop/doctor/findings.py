"""A finding of a check of the machine."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; cure is empty if it needs none."""

    level: str  # OK | NOTE | PROBLEM
    check: str
    text: str
    cure: str = ""
