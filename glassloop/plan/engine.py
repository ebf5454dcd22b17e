"""The engine of a run, from its config and the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glassloop.config import Config, MemoryConfig
from glassloop.config.quantised import unread_quantization
from glassloop.config.support import beyond
from glassloop.plan.support import longest_row, unsupported
from glassloop.plan.targets import with_targets
from glassloop.predict.shapes import config_values, shapes_of


@dataclass(frozen=True)
class Choice:
    """An engine, never auto, and why auto did not choose fused.

    `why` is empty if it did, or was not asked.
    """

    engine: str
    why: str = ""


def choose_engine(
    config: Config, model: Mapping[str, Any] | None, *, on_cuda: bool, lacking: str = ""
) -> Choice:
    """Choose the named engine; under auto, fused or peft.

    auto takes `fused` on CUDA if it supports the run, else `peft`.

    Args:
        model: of the model's config.json; None: unknown, and taken for one that fused supports.
        lacking: what the machine lacks for fused, in words; empty if it lacks nothing.
    """
    if config.execution.engine != "auto":
        return Choice(config.execution.engine)
    if not on_cuda:
        return Choice("peft", "no CUDA GPU")
    if (found := beyond(dict(config), "fused")) is not None:
        what, limit = found
        return Choice("peft", f"{what}, {limit.why}")
    if config.model.trust_remote_code and "AutoModelForCausalLM" in (
        (model or {}).get("auto_map") or {}
    ):
        return Choice("peft", "the model brings Python code of its own, fused would not run it")
    if (problem := unsupported(model or {})) is not None:
        return Choice("peft", problem)
    longest, asked = longest_row(model or {}), config.data.max_tokens
    if longest is not None and asked > longest:
        return Choice("peft", f"data.max_tokens = {asked}, fused knows this model to {longest}")
    return Choice("peft", lacking) if lacking else Choice("fused")


def with_engine(config: Config, choice: Choice) -> Config:
    """Put the chosen engine's name into the config.

    Raises ValueError for memory.* and split passes with another engine than fused.
    """
    if choice.engine != "fused" and config.execution.layout == "split":
        raise ValueError(
            f"execution.layout = split needs execution.engine=fused, but auto chose "
            f"{choice.engine} ({choice.why}). Set execution.layout=packed, or fix that reason"
        )
    if choice.engine != "fused" and config.memory != MemoryConfig():
        raise ValueError(
            f"memory.* only applies to execution.engine=fused, but auto chose {choice.engine} "
            f"({choice.why}). Remove memory.*, or fix that reason"
        )
    return config.model_copy(
        update={"execution": config.execution.model_copy(update={"engine": choice.engine})}
    )


def in_words(config: Config, choice: Choice) -> str:
    """auto's choice, for the header; empty if the engine was named."""
    if config.execution.engine != "auto":
        return ""
    return f"{choice.engine} (auto: {choice.why})" if choice.why else f"{choice.engine} (auto)"


def planned_engine(config: Config) -> tuple[Config, str]:
    """The config with CUDA's engine and targets, and why.

    Raises ValueError for fields that the chosen engine does not use, and for a model that a named
    `fused` does not support, or one that comes quantised in a way that is not read.
    """
    model = config_values(config.model.id)
    own = (model or {}).get("quantization_config")
    if isinstance(own, dict) and (problem := unread_quantization(own, config.model)) is not None:
        raise ValueError(problem)
    named_fused = config.execution.engine == "fused"
    if named_fused and (problem := unsupported(model or {})) is not None:
        raise ValueError(f"execution.engine = fused: {problem}: set execution.engine=peft")
    shapes, _ = shapes_of(config.model.id)
    if shapes is not None:
        config = with_targets(config, shapes.linear_layers)
    choice = choose_engine(config, model, on_cuda=True)
    if config.execution.engine != "auto":
        return config, choice.engine
    said = f"auto: {choice.engine} on CUDA"
    if choice.engine == "peft":
        said += f" too ({choice.why})"
    elif model is None:
        said += ", if fused supports the model (its config.json is not here); peft on a CPU"
    else:
        said += ", peft on a CPU"
    return with_engine(config, choice), said
