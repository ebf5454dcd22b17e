"""Presets: functions that return values other than the defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Loss that the recipe's own notebook printed, by update: medical-o1, 500 rows, one T4, fp16.
NOTEBOOK_LOSS_NATS = {10: 1.914, 20: 1.421, 30: 1.366, 40: 1.329, 50: 1.295, 60: 1.327}

EXPECTATIONS = {
    "r1_8b_notebook": "the notebook's own curve, loss by update: "
    + ", ".join(f"{update}: {loss}" for update, loss in NOTEBOOK_LOSS_NATS.items())
    + "; final gradient norm 0.202"
}


RECIPE_SCHEDULE = {"updates": 60, "warmup_updates": 5}


def r1_8b_scam() -> dict[str, Any]:
    """The recipe on scam calls: 600 rows, 60 updates of 16."""
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


def r1_32b_scam() -> dict[str, Any]:
    """The recipe on the 32B Qwen distill.

    Layers stream to a card that is too small.
    """
    return {**r1_8b_scam(), **_larger("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")}


def r1_70b_scam() -> dict[str, Any]:
    """The recipe on the 70B Llama distill.

    Layers stream to a card that is too small.
    """
    return {**r1_8b_scam(), **_larger("deepseek-ai/DeepSeek-R1-Distill-Llama-70B")}


def _larger(model: str) -> dict[str, Any]:
    """A larger base; packed passes, long enough to hide its copies."""
    return {"model": {"id": model}, "execution": {"layout": "packed", "pass_tokens": None}}


def r1_8b_medical() -> dict[str, Any]:
    """The recipe on medical reasoning: question, chain of thought, response."""
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
    """The recipe's notebook as it ran.

    One GPU, fp16, loss on the whole text, lr(1) = 0.
    """
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
    """SmolLM2-135M in NF4 on the sample of calls, for two CPU ranks."""
    return {
        "model": {"id": "smollm2"},
        "data": {
            "source": "sample",
            "format": "scam",
            "scam_reasoning": "drop",
            "template": "chat",
            "heldout": 0.2,
            "max_tokens": 384,
        },
        "batch": {"size": 2, "rows_per_update": 4},
        "schedule": {"epochs": 1, "warmup_updates": 2},
        "optimizer": {"lr": 2e-3},
        "execution": {"precision": "fp32", "checkpointing": False},
        "evaluation": {
            "generate_rows": 19,
            "generate_batch": 10,  # a rank's whole share
            "max_new_tokens": 32,
            "samples": 1,
        },
        "checkpoint": {"every_updates": 10},
        "record": {"probe_every_updates": 5, "text": "full"},  # glassloop's own sample
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "r1_8b_scam": r1_8b_scam,
    "r1_32b_scam": r1_32b_scam,
    "r1_70b_scam": r1_70b_scam,
    "r1_8b_medical": r1_8b_medical,
    "r1_8b_notebook": r1_8b_notebook,
    "smollm2_demo": smollm2_demo,
}
