"""Strip a run of rows, answers, folders and names, for sharing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from glassloop.record.observers import under_policy
from glassloop.record.reading import Record, RunData, setting
from glassloop.record.records import Event
from glassloop.report.comparing import Comparison

PACKED = frozenset({"f32", "u8", "u16", "u32", "codes"})  # keys of numbers as base64
TEXTS = ("data.system",)  # fields of a config that hold text for the model
LEFT_OUT = "(left out)"
NOBODY = {"root", "user", "users", "home", "shared", "public", "ubuntu", "runner", "nobody"}
A_HOME = re.compile(r"[/\\](?:home|Users)[/\\]+([^/\\\s'\":,;]+)")
ABSOLUTE = re.compile(
    r"""(?<![\w.~/\\:<-])
        (?: file:/+ | ~[\w.-]*/ | [A-Za-z]:[\\/] | \\\\ | /(?=[\w.~-]) )
        [^\s'",;:)\]}>|]*""",
    re.VERBOSE,
)


def without_names(data: dict[str, Any]) -> dict[str, Any]:
    """Cut absolute paths to their last part, and hide names.

    Known names are the user's own, and those of home folders in the data (/home/NAME).
    """
    homes = sorted(filter(None, {str(Path.home()), os.environ.get("HOME")}), key=len, reverse=True)
    names = {
        os.environ.get("USER", ""),
        os.environ.get("LOGNAME", ""),
        *map(os.path.basename, homes),
    }
    names |= {found for text in _texts(data) for found in A_HOME.findall(text)}
    people = [_whole(name) for name in names if len(name) > 1 and name.lower() not in NOBODY]
    somebody = re.compile("|".join(sorted(people, key=len, reverse=True))) if people else None

    def cleaned(text: str) -> str:
        for home in homes:
            if len(home) > 1:
                text = text.replace(f"{home}/", "~/")
        text = ABSOLUTE.sub(_last_part, text)
        return somebody.sub("(user)", text) if somebody else text

    return _changed(data, cleaned)


def without_text(run: RunData) -> RunData:
    """Number a run's rows, and drop texts and answers.

    Ids are replaced wherever they stand, in messages and reasons too. The system prompt and the
    command line that may hold it are left out as well.
    """
    ids = {row["row_id"] for row in run.rows} | {sample["row_id"] for sample in run.samples}
    alias = {row_id: f"row {i}" for i, row_id in enumerate(sorted(ids, key=_natural), 1)}
    any_id = "|".join(re.escape(row_id) for row_id in sorted(alias, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)({any_id})(?!\w)") if any_id else None

    def cleaned(text: str | None) -> str | None:
        return (
            text
            if text is None or pattern is None
            else pattern.sub(lambda found: alias[found[1]], text)
        )

    def event_of(record: Record) -> Record:
        # details may hold ids of rows that have no record; under_policy finds them by their key
        event = Event(
            record["update"],
            record["kind"],
            record["message"],
            record["command"],
            record["details"],
        )
        clean = under_policy(
            replace(event, message=cleaned(event.message) or "", command=cleaned(event.command)),
            "none",
        )
        return {
            **record,
            "message": clean.message,
            "command": clean.command,
            "details": clean.details,
        }

    rows = [{**row, "row_id": alias[row["row_id"]]} for row in run.rows]
    for row in rows:
        row.pop("text", None)
    config = run.config
    if config and setting(config, "data.system"):
        config = {**config, "data": {**config["data"], "system": LEFT_OUT}}
    env = (
        {name: value for name, value in run.env.items() if name != "command"}
        if run.env
        else run.env
    )
    return replace(
        run,
        updates=[{**record, "reason": cleaned(record["reason"])} for record in run.updates],
        events=[event_of(event) for event in run.events],
        rows=rows,
        samples=[],
        config=config,
        env=env,
    )


def shared(found: Comparison) -> Comparison:
    """Drop what is private from a comparison.

    Row ids, system prompts, folders and names of people.

    That they differ stays known. Names are found as in `without_names`, in whole configs.
    """
    found = _without_rows(found)
    said = {
        "runs": {id(run): run.name for run in found.runs},
        "values": [list(values) for _, values in found.differences],
        "floor": found.floor_from,
        "whys": [pair.why for pair in found.pairs],
    }
    seen = [(run.config, run.env, str(run.folder.resolve())) for run in found.runs]
    clean = without_names({**said, "seen": seen})
    runs = {id(run): replace(run, folder=Path(clean["runs"][id(run)])) for run in found.runs}
    names = [name for name, _ in found.differences]
    return replace(
        found,
        sides=tuple(
            replace(side, runs=tuple(runs[id(run)] for run in side.runs)) for side in found.sides
        ),
        differences=tuple(zip(names, map(tuple, clean["values"]), strict=True)),
        floor_from=clean["floor"],
        pairs=tuple(
            replace(pair, a=runs[id(pair.a)], b=runs[id(pair.b)], why=why)
            for pair, why in zip(found.pairs, clean["whys"], strict=True)
        ),
    )


def _without_rows(found: Comparison) -> Comparison:
    differences = [
        (name, tuple(LEFT_OUT if value else value for value in values) if name in TEXTS else values)
        for name, values in found.differences
    ]
    pairs = [
        replace(pair, went_in=replace(pair.went_in, a=LEFT_OUT, b=LEFT_OUT))
        if pair.went_in is not None and pair.went_in.quantity == "rows"
        else pair
        for pair in found.pairs
    ]
    return replace(found, differences=tuple(differences), pairs=tuple(pairs))


def _last_part(found: re.Match[str]) -> str:
    parts = [part for part in re.split(r"[/\\]+", found[0]) if part]
    return f"(...)/{parts[-1]}" if len(parts) > 1 else "(...)"


def _whole(name: str) -> str:
    """Return a pattern of the name as a word.

    A long name also counts between underscores, as in anna_run.
    """
    around = r"[A-Za-z0-9]" if len(name) > 3 else r"\w"
    return rf"(?<!{around}){re.escape(name)}(?!{around})"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in PACKED:
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _changed(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key: item if key in PACKED else _changed(item, change) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return value


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts "train:9" before "train:10"."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)
    ]
