"""A sentence of a run's summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.record.reading import RunData


@dataclass(frozen=True)
class Say:
    """One sentence of the summary.

    Attributes:
        topic: "ended" | "learned" | "stable" | "look".
        verdict: "good" | "bad" | "look" | "unknown": what mark stands before it.
        text: the sentence.
        update: which update shows it; None: none in particular.
        command: what to type next; None: nothing.
    """

    topic: str
    verdict: str
    text: str
    update: int | None = None
    command: str | None = None


def command_at(run: RunData, update: int) -> str | None:
    for event in run.events:
        if event["update"] == update and event["command"]:
            return event["command"]
    return None


def times(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def as_objects(said: Sequence[Say]) -> list[dict[str, Any]]:
    """Plain dicts for the page."""
    return [vars(one) for one in said]
