"""Read a study's file: question, grid of runs, claims. No torch.

    name: rank
    question: Does a higher rank lower held-out loss?
    base: smollm2_demo data.heldout=0.25 schedule.epochs=3     # words as train_loop.py takes them
    axes:
      optimizer.lr: [2e-4, 1e-3]            # a field and its values, or
      rank:                                 # a name of its own, with settings of several fields
        r8: {lora.r: 8, lora.alpha: 8}
        r16: {lora.r: 16, lora.alpha: 16}
    seeds: [1, 2, 3]
    equal: rows_seen                        # or updates: equal in cells of different batches
    claims:
      - {says: r=8 underfits, quantity: heldout_loss, cell: {rank: r8}, against: {rank: r16},
         expect: higher, by: 0.01}

A claim is about the difference of a quantity: the cell's minus what it is set against, seed by seed
(scale: share divides it by the latter). `against` may be a number. `by` is the least difference
that is worth the claim. `about` with `value` and `within` names a range instead.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.config import Config
from glassloop.config.arguments import parse
from glassloop.config.trust import TRUST
from glassloop.disk.plain_yaml import MOST_CHARACTERS, plain_yaml
from glassloop.study.axes import read_axes
from glassloop.study.checks import (
    Complaint,
    StudyError,
    flag,
    listed,
    measures,
    near,
    one_of,
    seeds,
    text,
    whole,
)
from glassloop.study.claims import Axes, Claim, read_claim

# What a cell is asked beside its base, unless the base or the command line says otherwise: nothing
# that costs time or disk and tells a study nothing.
CELL_WORDS = (
    "batch.ranks=1",
    "evaluation.generate_rows=0",
    "evaluation.samples=0",
    "checkpoint.every_updates=null",
    "checkpoint.keep=1",
    "record.capsules=0",
)
KEYS = (
    "name",
    "question",
    "cannot_say",
    "base",
    "axes",
    "seeds",
    "equal",
    "parallel",
    "measure",
    "timeout_s",
    "claims",
    "critical",
    "bisect",
)
# Two names of one thing: the later word replaces the earlier.
PAIR = ("batch.accumulation", "batch.rows_per_update")
MOST_CELLS = 10_000
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Study:
    """A study's file and the words of the command line."""

    file: str
    name: str
    question: str
    cannot_say: str
    words: tuple[str, ...]  # of every cell, in rising precedence
    axes: Axes
    seeds: tuple[int, ...]
    equal: str | None
    parallel: int
    measure: tuple[str, ...]
    timeout_s: float
    claims: tuple[Claim, ...]
    critical: bool
    bisect: bool


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str  # of its folder too
    group: str  # the same without the seed
    settings: Mapping[str, str]  # axis -> label
    seed: int
    config: Config


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study. Raises StudyError naming file and field."""
    try:
        with path.open("rb") as file:
            values = plain_yaml(file.read(4 * MOST_CHARACTERS).decode("utf-8"))
    except OSError as error:
        raise StudyError(
            f"{path}: {error.strerror}; name a study's YAML file, such as studies/rank.yaml"
        ) from None
    except ValueError as error:
        raise StudyError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise StudyError(
            f"{path}: expected fields such as `axes:`, found {type(values).__name__}; see studies/ "
            "for examples"
        )
    bad = Complaint(str(path))
    for key in values:
        if key not in KEYS:
            raise bad(str(key), values[key], f"no field of a study; {near(str(key), KEYS)}")
    name = values.get("name", path.stem)
    if not isinstance(name, str) or not PLAIN.fullmatch(name):
        raise bad("name", name, "letters, digits, '.', '_' and '-', a letter or digit first")
    axes = read_axes(values.get("axes"), bad)
    study = Study(
        file=str(path),
        name=name,
        question=text(values, "question", bad),
        cannot_say=text(values, "cannot_say", bad),
        words=_words(values.get("base"), overrides, axes, bad),
        axes=axes,
        seeds=seeds(values.get("seeds", [1, 2, 3]), bad),
        equal=one_of(values, "equal", ("rows_seen", "updates"), None, bad),
        parallel=whole(values, "parallel", 1, bad),
        measure=measures(values.get("measure", ["loss", "stability", "memory"]), bad),
        timeout_s=float(whole(values, "timeout_s", 3600, bad)),
        claims=tuple(
            read_claim(item, place, axes, bad)
            for place, item in enumerate(listed(values, "claims", bad), 1)
        ),
        critical=flag(values, "critical", bad),
        bisect=flag(values, "bisect", bad),
    )
    in_file = [field for _, settings in axes for one in settings for field, _ in one.fields]
    in_file += _names(study.words[: len(study.words) - len(overrides)])
    if TRUST in in_file and TRUST not in _names(overrides):
        raise bad(TRUST, "in the file", f"a file cannot have code run; add {TRUST}=true or =false")
    if "time" in study.measure and study.parallel > 1:
        raise bad(
            "parallel",
            study.parallel,
            "cells beside each other slow each other down; leave `time` out of measure, or set it "
            "to 1",
        )
    if study.critical and "batch.accumulation" not in dict(axes):
        raise bad(
            "critical",
            True,
            "it compares accumulations: give axes a list batch.accumulation, or leave it out",
        )
    return study


def cells_of(study: Study, out: Path) -> list[Cell]:
    """Build the grid's cells, seed by seed.

    So a study that is cut off has compared something. Raises StudyError.
    """
    cells = math.prod(len(settings) for _, settings in study.axes) * len(study.seeds)
    if cells > MOST_CELLS:
        raise StudyError(
            f"{study.file}: axes and seeds make {cells:,} cells, {MOST_CELLS:,} at most: "
            "leave out settings, or make several studies of them"
        )
    base = _parsed(study, study.words, "base")
    found: list[Cell] = []
    for seed in study.seeds:
        for chosen in itertools.product(*(settings for _, settings in study.axes)):
            fields = [pair for setting in chosen for pair in setting.fields]
            labels = {
                axis: setting.label for (axis, _), setting in zip(study.axes, chosen, strict=True)
            }
            group = "-".join(_short(axis, label) for axis, label in labels.items()) or "base"
            name = f"{group}-seed{seed}"
            if not PLAIN.fullmatch(name) or any(name == cell.name for cell in found):
                raise StudyError(
                    f"{study.file}: axes: two cells would be called {name}; give the settings "
                    "names of their own"
                )
            of_cell = [
                f"{field}={value}"
                for field, value in [
                    *fields,
                    ("seed", str(seed)),
                    ("run.dir", str(out / "cells")),
                    ("run.name", name),
                ]
            ]
            words = [*_without_pair(study.words, [field for field, _ in fields]), *of_cell]
            config = _parsed(study, words, f"cell {name}")
            if more := _equalised(study, base, config, name):
                config = _parsed(study, [*words, *more], f"cell {name}")
            found.append(Cell(name, group, labels, seed, config))
    return found


def rows_per_update(config: Config) -> int:
    """Of a whole window, over all ranks."""
    ranks = config.batch.ranks or 1
    return config.batch.size * ranks * config.batch.accumulation_for(ranks)


def _equalised(study: Study, base: Config, config: Config, name: str) -> list[str]:
    """Return words that give a cell the base's rows.

    Warmup follows in proportion. Epochs are equal rows already.
    """
    if study.equal is None:
        return []
    asked, ours = rows_per_update(base), rows_per_update(config)
    if study.equal == "updates":
        if config.schedule.updates is None or config.schedule.updates != base.schedule.updates:
            raise StudyError(
                f"{study.file}: equal = updates, but {name} has schedule.updates = "
                f"{config.schedule.updates}: "
                "say schedule.updates=N in base, and leave it out of axes"
            )
        return []
    words = []
    if config.schedule.warmup_updates:
        warmup = max(1, round(config.schedule.warmup_updates * asked / ours))
        words.append(f"schedule.warmup_updates={warmup}")
    if config.schedule.updates is not None:
        updates, left = divmod(config.schedule.updates * asked, ours)
        if left or not updates:
            raise StudyError(
                f"{study.file}: equal = rows_seen: {config.schedule.updates} updates of {asked} "
                f"rows are no whole updates of {ours} "
                f"rows ({name}); choose schedule.updates so that the rows divide"
            )
        words.append(f"schedule.updates={updates}")
    return words


def _parsed(study: Study, words: Sequence[str], what: str) -> Config:
    try:
        return parse(list(words), prog="glassloop study")
    except ValueError as error:
        raise StudyError(f"{study.file}: {what}: {error}") from None


def _words(base: Any, overrides: Sequence[str], axes: Axes, bad: Complaint) -> tuple[str, ...]:
    try:
        in_base = shlex.split(base) if isinstance(base, str) else base
    except ValueError as error:
        raise bad("base", base, f"words as a shell takes them ({error})") from error
    in_base = in_base if isinstance(in_base, list) else []
    if base is not None and not (
        isinstance(base, str | list) and all(isinstance(one, str) for one in in_base)
    ):
        raise bad(
            "base", base, "words as train_loop.py takes them: a preset, then section.field=VALUE"
        )
    preset = (
        in_base[:1] if in_base and "=" not in in_base[0] and not in_base[0].startswith("-") else []
    )
    on_axes = {
        field: axis
        for axis, settings in axes
        for setting in settings
        for field, _ in setting.fields
    } | {"seed": "seeds"}
    for given in [*in_base, *overrides]:
        name, where = (
            given.removeprefix("--").partition("=")[0],
            "base" if given in in_base else "command line",
        )
        # In base it is what `equal` starts from.
        if name in on_axes and (where == "command line" or name == "seed"):
            raise bad(
                where, given, f"every cell has a value of its own: {on_axes[name]} says which"
            )
        if name.startswith(("run.", "resume")) or given in ("-h", "--help", "--print_config"):
            raise bad(where, given, "a study names its cells' folders itself: leave it out")
    words = [*CELL_WORDS, *in_base[len(preset) :]]
    return (
        *preset,
        *_without_pair(words, [given.removeprefix("--").partition("=")[0] for given in overrides]),
        *overrides,
    )


def _names(words: Sequence[str]) -> list[str]:
    return [one.removeprefix("--").partition("=")[0] for one in words]


def _without_pair(words: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Drop accumulation and rows per update if `fields` set either."""
    if not set(fields) & set(PAIR):
        return list(words)
    return [one for one in words if one.removeprefix("--").partition("=")[0] not in PAIR]


def _short(axis: str, label: str) -> str:
    """Word a setting as a part of a cell's name.

    It is the field's last word with its value, or a named setting's name.
    """
    named = axis if "." not in axis else axis.rpartition(".")[2]
    text = label if "." not in axis and not re.fullmatch(r"[\d.e-]+", label) else f"{named}{label}"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
