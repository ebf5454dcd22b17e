"""Sizes by name add up to the parameters that makers state."""

from __future__ import annotations

import pytest

from glassloop.predict.known import BY_NAME, sizes_by_name
from glassloop.predict.shapes import config_values, shapes_of

STATED = {  # billions of parameters, from the makers' model cards or the sum of their tensors
    "meta-llama/Llama-3.2-1B-Instruct": 1.236,
    "meta-llama/Llama-3.2-3B": 3.213,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.030,
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": 8.030,
    "meta-llama/Llama-3.3-70B-Instruct": 70.554,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": None,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 0.3618,
    "HuggingFaceTB/SmolLM2-1.7B": 1.711,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.494,
    "unsloth/Qwen2.5-1.5B-Instruct-unsloth-bnb-4bit": 1.544,
    "Qwen/Qwen2.5-Coder-3B": 3.086,
    "Qwen/Qwen2.5-Math-7B": 7.616,
    "Qwen/Qwen2.5-14B": 14.770,
    "Qwen/Qwen2.5-32B-Instruct": 32.764,
    "Qwen/Qwen2.5-72B": 72.706,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-1.7B-Base": 1.721,
    "Qwen/Qwen3-4B-Instruct-2507": 4.022,
    "Qwen/Qwen3-8B": 8.191,
    "Qwen/Qwen3-14B": 14.768,
    "Qwen/Qwen3-32B": 32.762,
    "mistralai/Mistral-7B-Instruct-v0.1": 7.242,
    "mistralai/Mistral-7B-v0.3": 7.248,
    "mistralai/Mistral-Nemo-Instruct-2407": 12.248,
    "mistralai/Ministral-8B-Instruct-2410": 8.020,
    "mistralai/Mistral-Small-Instruct-2409": 22.247,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23.572,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 23.572,
    "google/gemma-2-2b-it": 2.614,
    "google/gemma-2-9b": 9.242,
    "google/gemma-2-27b-it": 27.227,
    "google/gemma-3-270m": 0.268,
    "google/gemma-3-1b-it": 1.000,
    "google/gemma-3-4b-it": 3.880,
    "google/gemma-3-12b-it": 11.766,
    "google/gemma-3-27b-it": 27.009,
    "microsoft/Phi-3-mini-4k-instruct": 3.821,
    "microsoft/Phi-3.5-mini-instruct": 3.821,
    "microsoft/Phi-3-medium-128k-instruct": 13.960,
    "microsoft/phi-4": 14.660,
    "microsoft/Phi-4-mini-instruct": 3.836,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.777,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.616,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.770,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32.764,
    "unsloth/DeepSeek-R1-Distill-Llama-8B": 8.030,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70.554,
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": 8.191,
}


@pytest.fixture(autouse=True)
def _nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.mark.parametrize("model_id", [name for name, size in STATED.items() if size])
def test_a_row_adds_up_to_the_parameters_that_its_maker_states(model_id: str) -> None:
    shapes, where = shapes_of(model_id)
    assert shapes is not None, model_id
    assert "by its name" in where or "known" in where
    assert shapes.weights / 1e9 == pytest.approx(STATED[model_id], rel=1e-3)


@pytest.mark.parametrize(
    "model_id", ["NousResearch/Hermes-3-Llama-3.1-8B", "me/qwen", "phi-4-vision", "llama-3.1-9b"]
)
def test_another_name_is_not_guessed(model_id: str) -> None:
    assert sizes_by_name(model_id) is None
    shapes, why = shapes_of(model_id)
    assert shapes is None
    assert "not known by name" in why


def test_phi_has_joined_projections_and_says_so() -> None:
    shapes, _ = shapes_of("microsoft/phi-4")
    assert shapes is not None
    with pytest.raises(ValueError, match="phi-4 has qkv_proj, o_proj, gate_up_proj, down_proj"):
        shapes.trainable(lambda _: 16, ("q_proj",))
    # r (in + out) of qkv (5120, 7680), gate_up (5120, 35840), o (5120, 5120), down (17920, 5120)
    assert shapes.trainable(lambda _: 16, ("all-linear",)) == 40 * 16 * (
        12800 + 40960 + 10240 + 23040
    )


@pytest.mark.parametrize(("name", "family"), [(name, row[0]) for name, row in BY_NAME.items()])
def test_the_family_decides_the_engine(name: str, family: str) -> None:
    values = config_values(f"owner/{name}")
    assert values is not None
    assert values["model_type"] == family
