"""Two ranks with a copy of a run each, one damaged.

As on two hosts; the damage is in rank 1's copy.

`accelerate launch damaged.py FOLDER MODEL ROWS` writes damaged.json.

The last case goes through main(), which prints the refusal and ends with exit code 2.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tiny import FOLDER, run_of, state

from glassloop.config.arguments import parse
from glassloop.formula.dist import gather_objects
from glassloop.loop.build import build_run
from train_loop import main, update_once

RANK = int(os.environ["RANK"])
NAMES = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "rng_rank0.json",
    "rng_rank1.json",
)
# not state.json: a process reads it before the ranks meet, and one that refuses there ends


def saved_run() -> Path:
    """Train four updates and copy the run for rank 1.

    Checkpoints follow the second and the fourth.
    """
    run = run_of("saved", checkpoint={"keep": 9})
    for update in range(1, 5):
        outcome = update_once(run, update)
        assert outcome is not None
        run.tell(outcome)
        if update % 2 == 0:
            run.save(update)
    run.close_observers()
    gather_objects(None)
    if RANK == 1:
        shutil.copytree(run.folder, FOLDER / "copy")
    gather_objects(None)
    return run.folder


def damage(path: Path) -> bytes:
    """Cut a file of rank 1's copy in half.

    Returns what it held.
    """
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


def resumed(words: list[str]) -> str:
    try:
        run = build_run(parse(words))
    except ValueError as error:
        return str(error)
    return f"goes on from update {run.first_update} in {state(run)}"


def at_the_last(own: Path) -> dict[str, list[str]]:
    """Each file of rank 1's checkpoint in turn; what each rank says."""
    found = {}
    for name in NAMES:
        path = own / "checkpoints/update_000004" / name
        data = damage(path) if RANK == 1 else b""
        found[name] = gather_objects(resumed(["--resume", str(own), "--at", "4"]))
        if RANK == 1:
            path.write_bytes(data)
    return found


if __name__ == "__main__":
    folder = saved_run()
    own = folder if RANK == 0 else FOLDER / "copy"
    results: dict[str, object] = {"each file": at_the_last(own)}
    path = own / "checkpoints/update_000004/optimizer.safetensors"
    if RANK == 1:
        damage(path)
    results["passed over by one"] = gather_objects(resumed(["--resume", str(own)]))
    if RANK == 0:
        (FOLDER / "damaged.json").write_text(json.dumps(results))
    gather_objects(None)
    sys.exit(main(["--resume", str(own), "--at", "4"]))
