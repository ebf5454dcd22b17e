"""A finished run of a tiny model, and spoilt copies."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState

from glassloop.config.arguments import from_values
from glassloop.data.rows import Example, Turn
from glassloop.data.templates import Template
from glassloop.formula.optim import FlatAdapters
from glassloop.loop.build import build_run
from train_loop import train

SECRET_ROW = "the caller is Ottoline Quatermain of 12 Zanzibar Mews"


def write_calls(path: Path, rows: int = 24) -> Path:
    """Calls of format scam; each row of training carries SECRET_ROW."""
    lines = [
        {
            "dialogue": f"caller: {SECRET_ROW}, number {n}. "
            f"receiver: {'no' if n % 2 else 'yes'} {n * 7}.",
            "type": "ssn" if n % 2 else "wrong",
            "label": n % 2,
        }
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def finished_run(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """Train two updates on calls, in NF4.

    Adapters then get values that are felt.
    """
    AcceleratorState._reset_state(True)
    values: dict[str, Any] = {
        "model": {"id": str(model), "cache_dir": str(folder / "cache")},
        "lora": {"r": 4, "alpha": 8},
        "data": {
            "source": str(write_calls(folder / "calls.jsonl")),
            "format": "scam",
            "template": "chat",
            "heldout": 0.25,
            "max_tokens": 400,
        },
        "batch": {"size": 2, "accumulation": 2},
        "schedule": {"updates": 2, "warmup_updates": 1},
        "optimizer": {"lr": 1e-2},
        "execution": {"precision": "fp32", "checkpointing": False, "preflight": False},
        "evaluation": {"samples": 0, "generate_rows": 2, "max_new_tokens": 4},
        "record": {"text": "full", "capsules": 2},
        "run": {"dir": str(folder / "runs"), "name": "one"},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    run = build_run(from_values(values))
    louder(run.replica.adapters)
    assert train(run) == 0
    run.close()
    return run.folder


def louder(adapters: FlatAdapters, scale: float = 0.05) -> None:
    """Move B from zero.

    A missing or wrongly scaled adapter then changes the loss.
    """
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, place in adapters.slices.items():
            if "lora_B" in name:
                place.of(adapters.flat).copy_(scale * torch.randn(place.shape, generator=drawn))


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def signed_anew(checkpoint: Path) -> None:
    """Write a checkpoint's sums anew.

    Only a look inside a file then finds what is wrong.
    """
    sums = checkpoint / "SHA256SUMS"
    names = [line.split()[1] for line in sums.read_text().splitlines()]
    sums.write_text(
        "".join(
            f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n"
            for name in names
        )
    )


def prompt_of(template: Template, text: str, system: str | None = None) -> list[int]:
    """Ids of a single question, as a row's prompt has them."""
    turns = [*([Turn("system", system)] if system is not None else []), Turn("user", text)]
    return template.prompt_ids(Example("question", tuple(turns)))


def write_config(folder: Path, section: str, **fields: Any) -> None:
    """Change a section in every recorded config, with right sums."""
    kept = [folder / "config.yaml", *folder.glob("checkpoints/*/state.json")]
    for path in [*kept, *folder.glob("capsules/*/capsule.json")]:
        values = yaml.safe_load(path.read_text())
        config = values if path.name == "config.yaml" else values["config"]
        config.update({section: {**config[section], **fields}} if section else fields)
        path.write_text(json.dumps(values))  # JSON is YAML
        if path.parent != folder:
            signed_anew(path.parent)
