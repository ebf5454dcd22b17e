"""All that a study found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.study.critical import Critical
from glassloop.study.divergence import Divergence
from glassloop.study.results import CellResult, Group
from glassloop.study.spec import Study
from glassloop.study.verdicts import Judged


@dataclass(frozen=True)
class Answers:
    """What tables and pages show.

    results: of every cell. groups: cells that differ in their seed alone. judged: a verdict for
    each claim.
    """

    study: Study
    results: Sequence[CellResult]
    groups: Sequence[Group]
    judged: Sequence[Judged]
    critical: Sequence[Critical]
    diverged: Sequence[Divergence]
