"""Trained runs that replay opens, and its command in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from schemas import conform

from glassloop.cli.__main__ import main

WORDS = [
    "the",
    "caller",
    "asks",
    "for",
    "a",
    "code",
    "and",
    "receiver",
    "hangs",
    "up",
    "because",
    "nothing",
    "is",
    "checked",
]


def rows_file(path: Path, rows: int) -> Path:
    drawn = random.Random(5)
    lines = [
        {
            "prompt": " ".join(drawn.choices(WORDS, k=5)),
            "completion": " ".join(drawn.choices(WORDS, k=9)),
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def values_of(folder: Path, model: Path, **sections: dict) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": {"id": str(model), "quantization": "none"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"source": str(folder / "rows.jsonl"), "template": "chat", "max_tokens": 96},
        "batch": {"size": 2, "accumulation": 2},
        "schedule": {"updates": 9, "warmup_updates": 2},
        "optimizer": {"lr": 1e-2, "max_grad_norm": 0.5},
        "execution": {"precision": "fp32", "checkpointing": False},
        "evaluation": {"samples": 0},
        "checkpoint": {"every_updates": 4},
        "record": {"capture_updates": [7], "probe_every_updates": 2},
        "run": {"dir": str(folder), "name": "run"},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return values


def trained(folder: Path, model: Path, **sections: dict) -> Path:
    """A whole run through the loop, on rows in a file."""
    from glassloop.config.arguments import from_values
    from glassloop.loop.build import build_run
    from train_loop import train

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        rows_file(folder / "rows.jsonl", 18)
    run = build_run(from_values(values_of(folder, model, **sections)))
    assert train(run) == 0
    run.close_observers()
    return run.folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["replay", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.err + printed.out


def as_object(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    got, output = command(capsys, *words, "--json")
    assert got == code, output

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return conform("replay", json.loads(output, parse_constant=refuse))
