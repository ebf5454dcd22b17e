"""What a check of the machine found."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. cure is empty where nothing needs one."""

    level: str  # OK | NOTE | PROBLEM
    check: str
    text: str
    cure: str = ""
