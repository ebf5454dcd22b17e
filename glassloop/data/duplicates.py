"""Rows that repeat each other within training or across to held-out rows.

Compared is what the model is asked: all user turns, without the words that format scam puts before
a call, and whole texts. Answers and system turns do not count.

* exact: equal once runs of whitespace are one space;
* near: not exact, and the sets of runs of three words (lower case, without punctuation) have a
  Jaccard index, shared / all, of 0.7 or more.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from glassloop.data.rows import Example
from glassloop.data.scam import SCAM_QUESTION

RUN_WORDS = 3
SHARED_TENTHS = 7
NEAR_JACCARD = SHARED_TENTHS / 10
BLOCK = 2000  # examples that are looked up together


def asked(example: Example) -> str:
    """The text of an example that is compared, whitespace made single spaces."""
    return " ".join(
        " ".join(
            turn.content.removeprefix(SCAM_QUESTION)
            for turn in example.turns
            if turn.role in ("user", "text")
        ).split()
    )


def key(example: Example) -> bytes:
    """Equal for exact duplicates, and for nothing else."""
    return hashlib.sha256(asked(example).encode()).digest()


def is_no_copy(example: Example) -> bool:
    """False for an example that a mix has made of another one."""
    return "+" not in example.row_id


def repeated(examples: Iterable[Example]) -> int:
    """Number of examples that exactly repeat an earlier one.

    Copies of a mix do not count.
    """
    counts = Counter(map(key, filter(is_no_copy, examples)))
    return counts.total() - len(counts)


class HeldoutRuns:
    """Runs of held-out rows, to find near duplicates of other rows.

    Two sets can only be near if they share one of their rarest runs: of n runs, the n - 0.7 n + 1
    rarest in one order of all runs. So only these are looked up, and the rows that they lead to
    are compared in full. A run is its 64-bit hash.
    """

    def __init__(self, heldout: Sequence[Example]) -> None:
        self._ids = [example.row_id for example in heldout]
        self._keys = set(map(key, heldout))
        self._runs, self._ends = _flat(heldout)
        self._known, self._often = np.unique(self._runs, return_counts=True)
        rare, holders = self._rarest(self._runs, self._ends)
        by_run = np.lexsort((holders, rare))
        self._rare, self._holders = rare[by_run], holders[by_run]

    def near(self, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """Find the nearest near duplicate of each example.

        Returns:
            (row id, held-out row id) for each example that has one.
        """
        pairs: list[tuple[str, str]] = []
        for start in range(0, len(examples) if self._ids else 0, BLOCK):
            pairs += self._near(examples[start : start + BLOCK])
        return pairs

    def _near(self, examples: Sequence[Example]) -> list[tuple[str, str]]:
        runs, ends = _flat(examples)
        rare, rows = self._rarest(runs, ends)
        starts, stops = (np.searchsorted(self._rare, rare, side) for side in ("left", "right"))
        candidates: dict[int, set[int]] = defaultdict(set)
        for at in np.flatnonzero(starts < stops).tolist():
            candidates[int(rows[at])].update(self._holders[starts[at] : stops[at]].tolist())
        pairs = []
        for row, places in sorted(candidates.items()):
            own = set(runs[ends[row] : ends[row + 1]].tolist())
            nearest, place = max((self._jaccard(own, place), place) for place in places)
            if nearest >= NEAR_JACCARD and key(examples[row]) not in self._keys:
                pairs.append((examples[row].row_id, self._ids[place]))
        return pairs

    def _jaccard(self, own: set[int], place: int) -> float:
        other = self._runs[self._ends[place] : self._ends[place + 1]]
        if not NEAR_JACCARD <= len(own) / len(other) <= 1 / NEAR_JACCARD:
            return 0.0
        shared = len(own.intersection(other.tolist()))
        return shared / (len(own) + len(other) - shared)

    def _rarest(self, runs: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rarest runs of each row, and the row of each."""
        sizes = np.diff(ends)
        rows = np.repeat(np.arange(len(sizes)), sizes)
        at = np.minimum(np.searchsorted(self._known, runs), max(0, len(self._known) - 1))
        often = np.where(self._known[at] == runs, self._often[at], 0)
        order = np.lexsort((runs, often, rows))  # by row, then the rarest first
        most = sizes - -(-SHARED_TENTHS * sizes // 10) + 1
        kept = order[np.arange(len(runs)) - ends[rows] < most[rows]]
        return runs[kept], rows[kept]


def _flat(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Hash all examples' runs of words.

    Returns the hashes end to end, and where each example's end (0 first)."""
    found, ends = array("q"), [0]
    for example in examples:
        words = re.findall(r"\w+", asked(example).lower())
        count = max(1, len(words) - RUN_WORDS + 1)
        found.extend({hash(tuple(words[start : start + RUN_WORDS])) for start in range(count)})
        ends.append(len(found))
    return np.frombuffer(found, np.int64), np.array(ends)
