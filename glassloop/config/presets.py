"""Named starting points: functions that return the values in which a run differs from the defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Loss that the recipe's own notebook printed, by update: medical-o1, 500 rows, one T4, fp16. What to expect of r1_8b_notebook.
NOTEBOOK_LOSS_NATS = {10: 1.914, 20: 1.421, 30: 1.366, 40: 1.329, 50: 1.295, 60: 1.327}

EXPECTATIONS = {
    "r1_8b_notebook": "the notebook's own curve, loss by update: "
    + ", ".join(f"{update}: {loss}" for update, loss in NOTEBOOK_LOSS_NATS.items())
    + "; final gradient norm 0.202"
}


RECIPE_SCHEDULE = {"updates": 60, "warmup_updates": 5}


def r1_8b_scam() -> dict[str, Any]:
    """The recipe on scam calls: 600 of BothBosu/scam-dialogue's training rows, 16 rows an update, 60 updates."""
    return {
        "data": {
            "source": "BothBosu/scam-dialogue",
            "format": "scam",
            "rows": 600,
            "heldout": "test",
            "heldout_rows": 64,
            "template": "r1",
        },
        "schedule": dict(RECIPE_SCHEDULE),
        "batch": {"size": 2, "rows_per_update": 16},
        "tracking": {"to": ["wandb"]},
    }


def r1_8b_medical() -> dict[str, Any]:
    """The recipe on medical reasoning: 600 rows with question, chain of thought and response."""
    return {
        "data": {
            "source": "FreedomIntelligence/medical-o1-reasoning-SFT",
            "config": "en",
            "format": "reasoning",
            "rows": 600,
            "heldout": 0.005,
            "heldout_rows": 64,
            "template": "r1",
        },
        "schedule": dict(RECIPE_SCHEDULE),
        "batch": {"size": 2, "rows_per_update": 16},
        "tracking": {"to": ["wandb"]},
    }


def r1_8b_notebook() -> dict[str, Any]:
    """What the recipe's notebook really ran: one GPU, fp16, its text form, loss on the whole text, lr(1) = 0."""
    return {
        "data": {
            "source": "FreedomIntelligence/medical-o1-reasoning-SFT",
            "config": "en",
            "format": "reasoning",
            "rows": 500,
            "shuffle": False,
            "template": "instruct",
            "labels": "everything",
        },
        "batch": {"size": 4, "accumulation": 4},
        "schedule": {**RECIPE_SCHEDULE, "first": "zero"},
        "execution": {"precision": "fp16"},
        "tracking": {"to": ["wandb"]},
    }


def smollm2_demo() -> dict[str, Any]:
    """The embedded default: SmolLM2-135M in NF4 on glassloop's own sample of calls, small enough for two CPU processes."""
    return {
        "model": {"id": "smollm2"},
        "data": {
            "source": "sample",
            "format": "scam",
            "template": "chat",
            "heldout": 0.2,
            "heldout_rows": 12,
            "max_tokens": 384,
        },
        "batch": {"size": 2, "rows_per_update": 8},
        "schedule": {"updates": 10, "warmup_updates": 2},
        "optimizer": {"lr": 2e-3},
        "execution": {"precision": "fp32", "checkpointing": False},
        "evaluation": {"generate_rows": 4, "max_new_tokens": 72, "samples": 1},
        "checkpoint": {"every_updates": 5},
        "record": {"probe_every_updates": 1},
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "r1_8b_scam": r1_8b_scam,
    "r1_8b_medical": r1_8b_medical,
    "r1_8b_notebook": r1_8b_notebook,
    "smollm2_demo": smollm2_demo,
}
