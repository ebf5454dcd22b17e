"""Inputs that are damaged or mean harm: the list of docs/reliability.md's table."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_runs
from hostile_models import config_cases, model_cases
from hostile_place import HARM, Case, Place
from hostile_rows import row_cases

from glassloop.config import as_dict
from glassloop.disk.publish import SUMS
from glassloop.saved.capsule import read_capsule
from glassloop.saved.checkpoint import load_checkpoint


def outcome(case: Case, place: Place) -> str:
    """What the input got, without temporary folders and libraries' words."""
    try:
        text = f"taken: {case[1](place)}"
    except ValueError as error:
        text = f"refused: {error}"
    text = re.sub(
        r"cannot be read: .*; the file is",
        "cannot be read: (what the library says); the file is",
        text,
    )
    text = re.sub(r"(malformed|does not fit): (?!.*was \d).*", r"\1: (what the library says)", text)
    text = re.sub(r"[0-9a-f]{64}", "(sum)", text.replace(os.getcwd(), "(this folder)"))
    for path in (place.run.folder, place.folder, place.model):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    text = re.sub(
        r"is not readable YAML: .*",
        "is not readable YAML: (what the library says)",
        text,
        flags=re.DOTALL,
    )
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return (
        text.replace("\n", " ")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("update_000002", "update_N")
        .strip()
    )


def saved(kind: str, change: Callable[[Path, Place], None]) -> Callable[[Place], str]:
    """A copy of the run's checkpoint or capsule, changed, and read again."""

    def gets(place: Place) -> str:
        source = next((place.run.folder / kind).glob("update_*"))
        path = place.folder / kind / source.name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        change(path, place)
        if kind == "capsules":
            return str(read_capsule(path).facts.update)
        run = place.run
        known = {
            "base_hash": run.replica.plain_engine.report.base_hash,
            "config": as_dict(run.config),
        }
        state = load_checkpoint(
            path,
            adapters=run.replica.adapters,
            optimizer=run.replica.optimizer,
            rank=0,
            world_size=1,
            **known,
        )
        return f"update {state.update}"

    return gets


def put(name: str, content: bytes) -> Callable[[Path, Place], None]:
    """Write a file of the folder anew, with a right sum."""

    def change(path: Path, _place: Place) -> None:
        import hashlib

        (path / name).write_bytes(content)
        sums = re.sub(
            rf"^\w+  {re.escape(name)}$",
            f"{hashlib.sha256(content).hexdigest()}  {name}",
            (path / SUMS).read_text(),
            flags=re.M,
        )
        (path / SUMS).write_text(sums)

    return change


def renamed_in_sums(name: str, to: str) -> Callable[[Path, Place], None]:
    def change(path: Path, _place: Place) -> None:
        (path / SUMS).write_text((path / SUMS).read_text().replace(f"  {name}\n", f"  {to}\n"))

    return change


def linked(name: str) -> Callable[[Path, Place], None]:
    def change(path: Path, place: Place) -> None:
        shutil.copy(path / name, place.folder / "outside")
        (path / name).unlink()
        (path / name).symlink_to(place.folder / "outside")

    return change


def sections() -> Iterator[tuple[str, list[Case]]]:
    yield ("Rows", row_cases(HARM))
    yield (
        "Checkpoints and capsules",
        [
            (
                "a pickle with a right sum as adapter",
                saved("checkpoints", put("adapter_model.safetensors", HARM)),
            ),
            (
                "a pickle with a right sum as optimizer state",
                saved("checkpoints", put("optimizer.safetensors", HARM)),
            ),
            (
                "a pickle with a right sum in a capsule",
                saved("capsules", put("adapter_before.safetensors", HARM)),
            ),
            (
                "a path out of the checkpoint in its sums",
                saved("checkpoints", renamed_in_sums("rng_rank0.json", "../../config.yaml")),
            ),
            (
                "an absolute path in its sums",
                saved("checkpoints", renamed_in_sums("rng_rank0.json", "/etc/passwd")),
            ),
            (
                "a path out of a capsule in its sums",
                saved("capsules", renamed_in_sums("rng_rank0.json", "../../config.yaml")),
            ),
            ("a link in place of a checkpoint's file", saved("checkpoints", linked("state.json"))),
            ("a link in place of a capsule's file", saved("capsules", linked("capsule.json"))),
        ],
    )
    yield "A run's folder", hostile_runs.cases()
    yield "Models and adapters", model_cases()
    yield "Configs", config_cases()


def table(place: Place) -> str:
    """Markdown: what was given, what it got."""
    parts = []
    for title, cases in sections():
        rows = [f"| {case[0]} | {outcome(case, place)} |" for case in cases]
        parts.append("\n".join([f"| {title}: given | what it got |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"
