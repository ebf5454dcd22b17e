"""The facts of a capsule as plain values, to JSON and back.

Every field of a file is checked. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glassloop.data.rows import Row

SCHEMA = 1  # raised when a field changes its meaning; older ones open
MOST_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class Expected:
    """The numbers that the update gave the first time, losses in nats.

    They may be infinite or NaN.
    """

    loss_nats: float | None  # token mean over all ranks; None without a supervised token
    grad_norm_pre_clip: float | None  # unscaled
    rank_loss_sums: tuple[float, ...]
    rank_grad_norms: tuple[float, ...] | None  # of each rank's share, unscaled; None under ddp
    row_loss_sums: tuple[tuple[float, ...], ...]  # by rank, in the order of its passes


@dataclass(frozen=True)
class CapsuleFacts:
    """The update in plain values."""

    update: int
    epoch: int
    attempt: int  # as in the update's record
    why: str  # "healthy" | "asked" | "nonfinite" | the kind of a detector's finding
    world_size: int
    lr: float
    supervised_tokens: int  # N of the formula
    loss_scale: float  # fp16: factor on the loss; 1 otherwise
    finite_updates: int  # fp16: finite updates in a row before this one
    max_grad_norm: float | None
    packed: bool
    pad_id: int
    base_hash: str
    config: dict[str, Any]  # the whole config
    versions: dict[str, str]
    # [rank][pass][row]: numbers of rows in the training set.
    passes: tuple[tuple[tuple[int, ...], ...], ...]
    rows: Mapping[int, Row]  # number -> row; empty in a capsule that was read and carries no tokens
    expected: Expected
    # Number -> row_digest(row); save_capsule makes them.
    digests: Mapping[int, str] = field(default_factory=dict)
    serial: int = 0  # given by save_capsule: the last one saved has the highest
    schema: int = SCHEMA

    @property
    def bad(self) -> bool:
        return self.why not in ("healthy", "asked")


def row_digest(row: Row) -> str:
    """16 hex digits that differ where tokens or labels differ."""
    return hashlib.sha256(array("i", row.input_ids).tobytes() + bytes(row.supervised)).hexdigest()[
        :16
    ]


def to_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()


def from_json(data: bytes, name: str) -> Any:
    """The value; raises ValueError naming the file."""
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is malformed: {error}") from error


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def plain_facts(facts: CapsuleFacts, text: str) -> dict[str, Any]:
    """The content of capsule.json.

    Rows are digests and, unless record.text = none, ids, tokens and run lengths of unsupervised,
    supervised, ... tokens.
    """
    rows = []
    for number, row in facts.rows.items():
        plain: dict[str, Any] = {"number": number, "digest": facts.digests[number]}
        if text != "none":
            runs = [len(list(run)) for _, run in itertools.groupby(row.supervised)]
            plain |= {
                "row_id": row.row_id,
                "input_ids": list(row.input_ids),
                "supervised_runs": runs,
            }
        rows.append(plain)
    plain_facts = {
        f.name: getattr(facts, f.name)
        for f in dataclasses.fields(facts)
        if f.name not in ("rows", "digests", "expected")
    }
    return {
        **plain_facts,
        "rows": rows,
        "expected": finite_or_text(dataclasses.asdict(facts.expected)),
    }


def finite_or_text(value: Any) -> Any:
    """The value with infinite and NaN numbers as texts, tuples as lists.

    The texts are "inf", "-inf" and "nan", which float() reads.
    """
    if isinstance(value, dict):
        return {key: finite_or_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def facts_from(data: bytes, name: str) -> CapsuleFacts:
    """Read the facts from the bytes of the file `name`.

    Raises ValueError naming the field that is missing, unknown or cannot be true.
    """
    plain = from_json(data, name)
    if isinstance(plain, dict) and _whole(plain.get("schema")) and plain["schema"] > SCHEMA:
        raise ValueError(
            f"{name} has schema {plain['schema']} and this glassloop reads up to "
            f"{SCHEMA}: install a newer one"
        )
    try:
        return _checked(plain)
    except ValueError as error:
        raise ValueError(f"{name} is malformed: {error}") from error


def _checked(plain: Any) -> CapsuleFacts:
    if not isinstance(plain, dict) or not _whole(plain.get("schema"), 1):
        raise ValueError("it says no schema")
    fields = {f.name for f in dataclasses.fields(CapsuleFacts)} - {"digests"}
    if odd := fields ^ plain.keys():
        raise ValueError(f"missing or unknown: {', '.join(sorted(odd))}")
    for name, (what, right) in CHECKS.items():
        if not right(plain[name]):
            raise ValueError(f"{name} is {str(plain[name])[:80]}, not {what}")
    rows, digests = _rows(plain.pop("rows"))
    passes = tuple(tuple(tuple(one) for one in rank) for rank in plain.pop("passes"))
    _check_passes(passes, digests, plain["world_size"])
    expected = _expected(plain.pop("expected"), passes)
    return CapsuleFacts(**plain, passes=passes, rows=rows, digests=digests, expected=expected)


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _token(value: Any) -> bool:
    return _whole(value) and value <= MOST_TOKEN_ID


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lists(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _ranks_passes(value: Any) -> bool:
    return _lists(value, lambda rows: _lists(rows, _whole) and len(rows) > 0)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


COUNT = ("a whole number", _whole)
FROM_ONE = ("a whole number of at least 1", lambda value: _whole(value, 1))
TEXT = ("text", lambda value: isinstance(value, str))
CHECKS = {  # field of capsule.json -> what it has to be
    "update": FROM_ONE,
    "epoch": COUNT,
    "attempt": FROM_ONE,
    "why": TEXT,
    "world_size": FROM_ONE,
    "lr": ("a number of at least 0", lambda value: _real(value) and value >= 0),
    "supervised_tokens": COUNT,
    "loss_scale": ("a number above 0", lambda value: _real(value) and value > 0),
    "finite_updates": COUNT,
    "max_grad_norm": (
        "null or a number above 0",
        lambda value: value is None or (_real(value) and value > 0),
    ),
    "packed": ("true or false", lambda value: isinstance(value, bool)),
    "pad_id": COUNT,
    "base_hash": TEXT,
    "config": ("a table", lambda value: isinstance(value, dict)),
    "versions": ("a table of texts", _texts),
    "passes": ("lists of row numbers by rank and pass", lambda value: _lists(value, _ranks_passes)),
    "rows": ("a list of tables", lambda value: _lists(value, lambda row: isinstance(row, dict))),
    "expected": ("a table", lambda value: isinstance(value, dict)),
    "serial": COUNT,
}


def _rows(plain: list[dict[str, Any]]) -> tuple[dict[int, Row], dict[int, str]]:
    rows: dict[int, Row] = {}
    digests: dict[int, str] = {}
    for place, item in enumerate(plain):
        number: Any = item.get("number")
        digest: Any = item.get("digest")
        if not _whole(number) or number in digests or not isinstance(digest, str):
            raise ValueError(f"rows[{place}] has number {number!r} and digest {digest!r}")
        digests[number] = digest
        if item.keys() == {"number", "digest"}:
            continue
        row_id: Any = item.get("row_id")
        ids: Any = item.get("input_ids")
        runs: Any = item.get("supervised_runs")
        right = (
            isinstance(row_id, str)
            and _lists(ids, _token)
            and _lists(runs, lambda run: _whole(run, 1))
        )
        if not right or not ids or sum(runs) != len(ids):
            raise ValueError(
                f"rows[{place}] (number {number}) has no sound row_id, input_ids and "
                "supervised_runs"
            )
        supervised = tuple(index % 2 == 1 for index, run in enumerate(runs) for _ in range(run))
        rows[number] = Row(row_id, tuple(ids), supervised)
        if row_digest(rows[number]) != digest:
            raise ValueError(f"rows[{place}] (number {number}) does not have its digest {digest}")
    if rows and rows.keys() != digests.keys():
        raise ValueError(f"only {len(rows)} of {len(digests)} rows carry tokens")
    return rows, digests


def _check_passes(
    passes: tuple[tuple[tuple[int, ...], ...], ...], digests: Mapping[int, str], world_size: int
) -> None:
    if len(passes) != world_size:
        raise ValueError(f"passes of {len(passes)} ranks, world_size is {world_size}")
    if sorted(row for rank in passes for one in rank for row in one) != sorted(digests):
        raise ValueError("passes do not hold each of its rows once")


def _expected(plain: dict[str, Any], passes: tuple[tuple[tuple[int, ...], ...], ...]) -> Expected:
    ranks = len(passes)
    try:
        norms = plain["rank_grad_norms"]
        expected = Expected(
            loss_nats=None if plain["loss_nats"] is None else float(plain["loss_nats"]),
            grad_norm_pre_clip=None
            if plain["grad_norm_pre_clip"] is None
            else float(plain["grad_norm_pre_clip"]),
            rank_loss_sums=tuple(map(float, plain["rank_loss_sums"])),
            rank_grad_norms=None if norms is None else tuple(map(float, norms)),
            row_loss_sums=tuple(tuple(map(float, rows)) for rows in plain["row_loss_sums"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected: {error!r}") from error
    of_ranks = [
        len(expected.rank_loss_sums),
        len(expected.row_loss_sums),
        len(expected.rank_grad_norms or passes),
    ]
    if of_ranks != [ranks] * 3 or any(
        len(r) not in (0, sum(map(len, p)))
        for r, p in zip(expected.row_loss_sums, passes, strict=True)
    ):
        raise ValueError("expected has not one number for each rank and row")
    return expected
