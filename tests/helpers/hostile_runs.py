"""A stranger's run, as reports and a resumed run meet it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glassloop.config.arguments import parse
from glassloop.record.observers import JsonlObserver
from glassloop.record.reading import read_run
from glassloop.report.following import Watched
from glassloop.report.page import page
from glassloop.report.payload import payload
from glassloop.saved.resuming import find_checkpoint

Change = Callable[[Path], object]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def report(folder: Path) -> str:
    page(payload(read_run(folder), text=False))
    return f"a page of {len(read_run(folder).updates)} updates"


def watch(folder: Path) -> str:
    watched = Watched(folder)
    watched.refresh()
    watched.ranks()
    return f"a screen of {len(watched.updates)} updates"


def resume(folder: Path) -> str:
    found, _ = find_checkpoint(parse(["--resume", str(folder)]))
    JsonlObserver(folder, "ids").close()
    return f"it resumes from {found.name if found else 'the beginning'}"


def gets(do: Callable[[Path], str], change: Change) -> Callable[[Any], str]:
    """What `do` makes of a changed copy of the run's folder."""

    def case(place: Any) -> str:
        folder = place.folder / "stranger"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place.run.folder, folder)
        change(folder)
        return do(folder)

    return case


def link(name: str, to: str = "") -> Change:
    """Move a file or folder out of the run; leave a link."""

    def change(folder: Path) -> None:
        outside = folder.parent / "elsewhere"
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(to or outside / name)

    return change


def hard_link(name: str) -> Change:
    def change(folder: Path) -> None:
        outside = folder.parent / "elsewhere"
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        os.link(folder / name, outside / name)

    return change


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def field(name: str, **values: Any) -> Change:
    """Other values in the first line of a file; ... removes one."""

    def change(folder: Path) -> None:
        first, *rest = (folder / name).read_text().splitlines()
        record = {k: v for k, v in (json.loads(first) | values).items() if v is not ...}
        (folder / name).write_text("\n".join([json.dumps(record), *rest]) + "\n")

    return change


def cases() -> list[tuple[str, Callable[[Any], str]]]:
    return [
        ("a link in place of metrics.jsonl, report", gets(report, link("metrics.jsonl"))),
        ("a link in place of events.jsonl, --resume", gets(resume, link("events.jsonl"))),
        ("events.jsonl is a hard link, --resume", gets(resume, hard_link("events.jsonl"))),
        ("events.jsonl is a hard link, report", gets(report, hard_link("events.jsonl"))),
        ("a link in place of config.yaml, --resume", gets(resume, link("config.yaml"))),
        ("a link in place of checkpoints/, --resume", gets(resume, link("checkpoints"))),
        (
            "metrics.jsonl is a link to /dev/zero, report",
            gets(report, link("metrics.jsonl", "/dev/zero")),
        ),
        ("a FIFO in place of rows.jsonl, report", gets(report, fifo("rows.jsonl"))),
        ("a FIFO in place of metrics.jsonl, watch", gets(watch, fifo("metrics.jsonl"))),
        ("a FIFO in place of metrics.jsonl, --resume", gets(resume, fifo("metrics.jsonl"))),
        (
            "metrics.jsonl of a terabyte without data, report",
            gets(report, lambda folder: os.truncate(folder / "metrics.jsonl", 2**40)),
        ),
        ("an alias bomb in config.yaml, report", gets(report, written("config.yaml", BOMB))),
        ("an alias bomb in config.yaml, --resume", gets(resume, written("config.yaml", BOMB))),
        (
            "250,000 brackets in config.yaml, report",
            gets(report, written("config.yaml", "[" * 250_000)),
        ),
        ("100,000 brackets in env.json, report", gets(report, written("env.json", "[" * 100_000))),
        ("a plan of 10^12 ranks, report", gets(report, written("plan.json", '{"ranks": 1e12}'))),
        ("a record without lr, report", gets(report, field("metrics.jsonl", lr=...))),
        ("a loss that is a list, report", gets(report, field("metrics.jsonl", loss_nats=[1]))),
        ("a loss of 1e300, report", gets(report, field("metrics.jsonl", loss_nats=1e300))),
        ("an update that is text, watch", gets(watch, field("metrics.jsonl", update="\x1b[2J"))),
        ("an update that is text, --resume", gets(resume, field("metrics.jsonl", update="one"))),
        ("a record of a newer glassloop, report", gets(report, field("metrics.jsonl", schema=99))),
    ]
