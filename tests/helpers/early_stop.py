"""An early end on two ranks, whole and resumed."""

from __future__ import annotations

import json
from typing import Any

import torch
from tiny import run_of

from glassloop.config.arguments import parse
from glassloop.formula.dist import gather_objects
from glassloop.loop import build
from glassloop.loop.run import Run
from glassloop.loop.watchdog import WAITS
from glassloop.record.reading import read_run
from glassloop.use.trained import open_trained
from train_loop import train

EVERY, PATIENCE = 4, 2
SECTIONS: dict[str, dict] = {
    "data": {"heldout": 0.4},
    "batch": {"size": 2, "accumulation": 1},
    "schedule": {"updates": 60, "warmup_updates": 2, "kind": "constant"},
    "optimizer": {"lr": 4e-2},
    "execution": {"deterministic": True},
    "evaluation": {"every_updates": EVERY, "patience": PATIENCE, "generate_rows": 0},
    "checkpoint": {"every_updates": 3},
}


def early_stop_resumed_through() -> dict[str, Any]:
    """Where both runs end, with which bits; each rank tells of itself."""
    whole = run_of("early", **SECTIONS)
    codes = [_trained(whole)]
    best = whole.course.best_update
    assert best is not None

    stopped = run_of("early-stopped", **SECTIONS)
    assert stopped.watchdog is not None
    does = stopped.watchdog.does

    def stop_on_rank_1(update: int, what: str) -> None:
        does(update, what)
        if (update, what) == (best + EVERY + 1, WAITS) and stopped.replica.rank == 1:
            stopped.stop.ask("SIGTERM")

    stopped.watchdog.does = stop_on_rank_1
    codes.append(_trained(stopped))
    resumed = build.build_run(parse(["--resume", str(stopped.folder)]))
    counted = resumed.course.worse_in_a_row
    codes.append(_trained(resumed))
    last = f"checkpoints/update_{whole.at:06d}"
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return {
        "codes": codes,
        "counted_when_resumed": counted,
        "updates": [whole.at, stopped.at, resumed.at],
        "best": [best, resumed.course.best_update],
        "same_bits": _bits(whole) == _bits(resumed),
        "same_files": all(
            (run.folder / last / name).read_bytes() == (whole.folder / last / name).read_bytes()
            for run in (whole, resumed)
            for name in names
        ),
        "result": [open_trained(run.folder).checkpoint.name for run in (whole, resumed)],
        "losses": [_losses(whole) == _losses(resumed), len(_losses(whole))],
        "stopped_by": stopped.stop.by,
        "end": read_run(resumed.folder).end["message"],  # type: ignore[index]
    }


def _trained(run: Run) -> int:
    code = train(run)
    run.close_observers()
    assert run.watchdog is not None
    run.watchdog.close()
    gather_objects(None)  # rank 0 has written everything
    return code


def _bits(run: Run) -> dict[str, Any]:
    """Adapters and optimizer, by name.

    A resume may bring them in another order, and with 0 in the padding between matrices.
    """
    adapters = run.replica.adapters
    kept = adapters.parameters | run.replica.optimizer.state[adapters.flat]
    return {
        name: one.detach().numpy().tobytes() if torch.is_tensor(one) else one
        for name, one in sorted(kept.items())
    }


def _losses(run: Run) -> list[float]:
    """Held-out losses on record."""
    lines = (run.folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["loss_nats"] for line in lines]
