"""A model card's front matter: base, data, licence, evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from glassloop.use.card.facts import LICENCES, Facts

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

METRICS = {  # score: (type as the hub knows it, name)
    "loss_nats": ("loss", "Loss, nats a token"),
    "accuracy": ("accuracy", "Accuracy"),
    "precision": ("precision", "Precision"),
    "recall": ("recall", "Recall"),
    "f1": ("f1", "F1"),
}
OWN_DATA = "own-rows"  # as the type of a data set that is not on the hub


def front_matter(facts: Facts, repo: str) -> str:
    """Write the hub's YAML, with its fences.

    huggingface_hub writes it and quotes what needs quotes. `repo`: owner/name.
    """
    from huggingface_hub import ModelCardData

    merged = facts.merge is not None
    results = eval_results(facts)
    more: dict[str, Any] = {}
    if facts.base_id:
        more["base_model_relation"] = "finetune" if merged else "adapter"
    data = ModelCardData(
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=facts.base_id,
        license=LICENCES[facts.base_id][0] if facts.base_id in LICENCES else None,
        datasets=[facts.data_id] if facts.data_id else None,
        tags=["glassloop"] if merged else ["lora", "glassloop"],
        model_name=repo.partition("/")[2] if results else None,
        eval_results=results or None,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---"


def eval_results(facts: Facts) -> list[EvalResult]:
    """The scores of these very weights on held-out rows.

    [] without an evaluation. Merged weights have none: it is the adapter that answered.
    """
    from huggingface_hub import EvalResult

    found = facts.evaluated
    if found is None or facts.merge is not None:
        return []
    rows = "held-out rows" if found.own_heldout else "other rows"
    values = {score.name: score.values.get("adapter") for score in found.scores}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.data_id or OWN_DATA,
            dataset_name=f"{found.rows} {rows}" + (f" of {facts.data_id}" if facts.data_id else ""),
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
            verified=False,
        )
        for score, (kind, name) in METRICS.items()
        if (value := values.get(score)) is not None and math.isfinite(value)
    ]
