"""Lines of results: JSON files, sums by arm, checks against the reference.

No torch.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.bench.spec import SCHEMA

# Largest relative difference of update 1's loss and gradient norm from the reference engine's on
# the same rows, by precision.
TOLERANCE = {"bf16": (2e-3, 5e-2), "fp16": (2e-3, 5e-2), "fp32": (1e-5, 1e-5)}
REFERENCE_ENGINE = "peft"
# Of a line and the reference that it is held to.
SAME_WORK = ("workload", "rows_per_update", "precision", "model", "r", "overrides")


@dataclass(frozen=True)
class Arm:
    """All repeats of one arm on one machine."""

    key: str
    cell: dict[str, Any]
    rows_digest: str
    lines: tuple[dict[str, Any], ...]

    def middle(self, *path: str) -> float | None:
        """Median of a number over the repeats; None without one."""
        found = [value for line in self.lines if (value := _at(line, path)) is not None]
        return statistics.median(found) if found else None

    @property
    def rates(self) -> list[float]:
        """Real tokens a second, all ranks together, of every repeat and turn."""
        return [rate for line in self.lines for rate in rates_of(line)]

    @property
    def tokens_per_s(self) -> float:
        """Real tokens, all ranks together: the median."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest repeat or turn, real tokens a second."""
        return min(self.rates), max(self.rates)


def rates_of(line: dict[str, Any]) -> list[float]:
    """Real tokens a second, all ranks together, of a line's turns."""
    turns = line.get("turns", ())
    if len(turns) < 2:  # or a line from before there were turns
        return [line["tokens_per_s"]["real"]]
    return [turn["real_tokens"] / turn["seconds"] for turn in turns]


def _at(line: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = line
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def read(file: Path) -> list[dict[str, Any]]:
    """The benchmark's lines of a file.

    Raises ValueError for a file that holds none, or a newer schema.
    """
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number} is not JSON ({error}): is it a file of glassloop bench?"
            ) from None
        if isinstance(line, dict) and line.get("kind") == "bench":
            if line.get("schema", 0) > SCHEMA:
                raise ValueError(
                    f"{file}, line {number} has schema {line['schema']}, this glassloop reads up "
                    f"to {SCHEMA}: update it"
                )
            lines.append(line)
    if not lines:
        raise ValueError(f"{file} holds no line of glassloop bench")
    return lines


def append(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def arms(lines: Iterable[dict[str, Any]]) -> list[Arm]:
    """Group measured, checked lines by arm, in order of appearance."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if (
            "failed" not in line
            and line.get("check", {}).get("within")
            and not line.get("check_only")
        ):
            machine = line["machine"]
            # Another card, commit or library is another arm.
            place = [machine["gpus"], machine["git"], machine["packages"]]
            grouped.setdefault(key_of(line) + json.dumps(place), []).append(line)
    return [
        Arm(key_of(found[0]), found[0]["cell"], found[0]["rows_digest"], tuple(found))
        for found in grouped.values()
    ]


def key_of(line: dict[str, Any]) -> str:
    """Key of an arm, equal for its repeats and for nothing else."""
    return json.dumps([line["cell"], line.get("rows_digest")], sort_keys=True)


def is_reference(cell: dict[str, Any]) -> bool:
    """The reference engine, one rank, the micro-batches as asked for, nothing varied."""
    plain = (
        cell["engine"] == REFERENCE_ENGINE and cell["layout"] == "literal" and cell["ranks"] == 1
    )
    return plain and not cell.get("varied")


def checked(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check a line's first loss and norm against the reference's.

    within: None without a reference; no table shows such a line. A reference line is its own
        measure.
    """
    if "failed" in line:
        return {"within": None, "why": "it was not measured"}
    cell = line["cell"]
    if is_reference(cell):
        return {"within": True, "why": "it is the reference"}
    reference = next((one for one in lines if _holds(one, line)), None)
    if reference is None:
        return {
            "within": None,
            "why": f"no {REFERENCE_ENGINE} line, literal on one rank, with the same rows",
        }
    ours, theirs = line["update_1"], reference["update_1"]
    loss_off, norm_off = (relative(ours[name], theirs[name]) for name in ("loss_nats", "grad_norm"))
    most = TOLERANCE[cell["precision"]]
    within = (
        loss_off is not None
        and norm_off is not None
        and loss_off <= most[0]
        and norm_off <= most[1]
    )
    return {
        "within": within,
        "against": reference["name"],
        "loss_off": loss_off,
        "norm_off": norm_off,
        "tolerance": list(most),
    }


def _holds(reference: dict[str, Any], line: dict[str, Any]) -> bool:
    return (
        "failed" not in reference
        and is_reference(reference["cell"])
        and reference["rows_digest"] == line["rows_digest"]
        and all(reference["cell"].get(name) == line["cell"].get(name) for name in SAME_WORK)
    )


def relative(ours: float | None, theirs: float | None) -> float | None:
    """Compute |ours / theirs - 1|; None without both numbers."""
    if ours is None or theirs is None or ours != ours or not theirs:
        return None
    return abs(ours / theirs - 1)
