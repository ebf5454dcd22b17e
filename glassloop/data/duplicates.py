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
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from glassloop.data.rows import Example
from glassloop.data.scam import SCAM_QUESTION

RUN_WORDS = 3
NEAR_JACCARD = 0.7


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


def repeated(examples: Iterable[Example]) -> int:
    """Number of examples that exactly repeat an earlier one.

    Copies of a mix do not count.
    """
    counts = Counter(key(example) for example in examples if "+" not in example.row_id)
    return counts.total() - len(counts)


def near_duplicates(train: Sequence[Example], heldout: Sequence[Example]) -> list[tuple[str, str]]:
    """Find the nearest near duplicate of each training row among held-out rows.

    Returns:
        (training row id, held-out row id) for each training row that has one.

    An index from runs to held-out rows finds what is shared; the time grows with the pairs of rows
    that share a run.
    """
    # run of words -> held-out rows that have it
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for place, example in enumerate(heldout):
        runs = _runs(example)
        sizes.append(len(runs))
        for run in runs:
            holders[run].append(place)
    heldout_keys = set(map(key, heldout))
    pairs = []
    for example in train:
        runs = _runs(example)
        shared: Counter[int] = Counter()
        for run in runs & holders.keys():
            shared.update(holders[run])
        nearest = max(
            (
                (count / (len(runs) + sizes[place] - count), place)
                for place, count in shared.items()
            ),
            default=(0.0, 0),
        )
        if nearest[0] >= NEAR_JACCARD and key(example) not in heldout_keys:
            pairs.append((example.row_id, heldout[nearest[1]].row_id))
    return pairs


def _runs(example: Example) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", asked(example).lower())
    return {
        tuple(words[start : start + RUN_WORDS])
        for start in range(max(1, len(words) - RUN_WORDS + 1))
    }
