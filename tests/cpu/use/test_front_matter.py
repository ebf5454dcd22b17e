"""The hub reads base, data, licence and evaluation from the card's front matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard

from glassloop.use.card.facts import Facts
from glassloop.use.card.front import front_matter
from glassloop.use.measuring import Score

BASE = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def facts(**changes: Any) -> Facts:
    scores = (
        Score("loss_nats", {"base": 2.0, "adapter": 1.23456789}, {}),
        Score("accuracy", {"base": 0.5, "adapter": 0.75}, {}),
        Score("f1", {"base": None, "adapter": None}, {}),
        Score("recall", {"base": 0.1, "adapter": float("nan")}, {}),
        Score("ended", {"base": 1.0, "adapter": 1.0}, {}),
    )
    known = {
        "base_id": BASE,
        "data_id": "owner/calls",
        "merge": None,
        "evaluated": SimpleNamespace(rows=64, own_heldout=True, scores=scores),
    }
    return cast(Facts, SimpleNamespace(**(known | changes)))


def read(found: Facts) -> dict[str, Any]:
    """As the hub's own reader sees it, in a whole card."""
    card = ModelCard(f"{front_matter(found, 'me/my-model')}\n\n# my-model\n")
    assert yaml.safe_load(front_matter(found, "me/my-model").strip("-")) is not None
    return card.data.to_dict()


def test_the_hub_s_own_reader_finds_base_data_and_scores() -> None:
    card = ModelCard(f"{front_matter(facts(), 'me/my-model')}\n\n# my-model\n")
    data: Any = card.data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.license, data.library_name, data.datasets) == ("mit", "peft", ["owner/calls"])
    assert data.model_name == "my-model"
    found = {one.metric_type: (one.metric_value, one.dataset_name) for one in data.eval_results}
    assert found == {
        "loss": (1.234568, "64 held-out rows of owner/calls"),
        "accuracy": (0.75, "64 held-out rows of owner/calls"),
    }
    assert {one.dataset_type for one in data.eval_results} == {"owner/calls"}


def test_own_rows_are_named_without_a_data_set() -> None:
    (result,) = read(facts(data_id=None))["model-index"][0]["results"]
    assert result["dataset"] == {"name": "64 held-out rows", "type": "own-rows"}
    assert "datasets" not in read(facts(data_id=None))


@pytest.mark.parametrize("changes", [{"evaluated": None}, {"merge": SimpleNamespace()}])
def test_without_an_evaluation_of_these_weights_there_is_no_index(changes: dict[str, Any]) -> None:
    assert "model-index" not in read(facts(**changes))


def test_merged_weights_are_a_finetune_of_transformers() -> None:
    found = read(facts(merge=SimpleNamespace()))
    assert (found["library_name"], found["base_model_relation"]) == ("transformers", "finetune")
    assert found["tags"] == ["glassloop"]


def test_an_unknown_base_leaves_base_relation_and_licence_out() -> None:
    found = read(facts(base_id=None, evaluated=None))
    assert not {"base_model", "base_model_relation", "license"} & set(found)


def test_no_value_breaks_out_of_the_yaml() -> None:
    evil = "x: [y] # \"'{}&a *a !!python/object:os.system %"
    assert read(facts(data_id=evil))["datasets"] == [evil]
