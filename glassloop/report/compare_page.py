"""What the page of a comparison is given."""

from __future__ import annotations

import time
from typing import Any

import glassloop
from glassloop.disk.secrets import without_secrets
from glassloop.record.reading import RunData, number, setting
from glassloop.report.columns import column
from glassloop.report.compare_text import parting_lines, tokens_per_s
from glassloop.report.comparing import Comparison
from glassloop.report.sharing import PACKED, shared

CURVES = {
    "loss": "loss_nats",
    "norm": "grad_norm_pre_clip",
    "lr": "lr",
    "update_s": "update_s",
    "supervised": "supervised_tokens",
}


def comparison_payload(found: Comparison, *, text: bool = True) -> dict[str, Any]:
    """Return the page's data.

    It holds no text of a row, but ids if two runs were given different rows.

    Args:
        text: False leaves out row ids, system prompts, folders and names of people, for sharing.
    """
    return without_secrets(_payload(found if text else shared(found)), leave=PACKED)


def _payload(found: Comparison) -> dict[str, Any]:
    runs = [
        {
            "name": run.name,
            "side": side.label,
            "seed": setting(run.config, "seed"),
            "update": [record["update"] for record in run.updates],
            "columns": {
                name: column(record[field] for record in run.updates)
                for name, field in CURVES.items()
            },
            "heldout": [[one["update"], number(one["loss_nats"])] for one in run.evaluations],
            "epochs": _epochs(run),
            "score": score,
            "tokens_per_s": tokens_per_s(run),
            "updates": f"{run.updates[-1]['update']:,} of {run.planned_updates:,}",
        }
        for side, scores in zip(found.sides, found.scores, strict=True)
        for run, score in zip(side.runs, scores, strict=True)
    ]
    pairs = [
        {
            "a": pair.a.name,
            "b": pair.b.name,
            "compared": pair.compared,
            "lines": parting_lines(pair),
            "updates": [one.update for one in (pair.went_in, pair.came_out) if one is not None],
            "verdict": pair.verdict,
            "why": pair.why,
        }
        for pair in found.pairs
    ]
    for run in runs:  # a number that is not finite has no place in JSON
        run["heldout"] = [
            [
                update,
                loss if loss is not None and loss == loss and abs(loss) != float("inf") else None,
            ]
            for update, loss in run["heldout"]
        ]
        score = run["score"]
        run["score"] = score if score is None or score - score == 0 else str(score)
    return {
        "kind": "compare",
        "title": " / ".join(dict.fromkeys(run["name"] for run in runs)),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "glassloop": glassloop.__version__,
        "runs": runs,
        "pairs": pairs,
        "measure": found.measure,
        "floor": found.floor,
        "floor_from": found.floor_from,
        "differences": [
            [name, [None if one is None else str(one) for one in values]]
            for name, values in found.differences
        ],
    }


def _epochs(run: RunData) -> list[list[int]]:
    """[first update, epoch] of each epoch after the first."""
    pairs = zip(run.updates, run.updates[1:], strict=False)
    return [
        [after["update"], after["epoch"]]
        for before, after in pairs
        if after["epoch"] != before["epoch"]
    ]
