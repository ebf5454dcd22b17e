"""What a list of doctor's findings holds."""

from __future__ import annotations

from glassloop.doctor.findings import Finding


def levels(findings: list[Finding], check: str) -> set[str]:
    return {one.level for one in findings if one.check == check}


def only(findings: list[Finding], level: str) -> Finding:
    (found,) = [one for one in findings if one.level == level]
    return found
