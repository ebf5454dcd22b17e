"""`execution.engine=auto`: which engine a run gets, from its config and the model's. Pure and without torch: asked by a run and `glassloop plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glassloop.config.config import Config, MemoryConfig
from glassloop.plan.honoured import unsupported


@dataclass(frozen=True)
class Choice:
    """engine: as in execution.engine, never auto. why: what decided where auto did not choose fused, in words; empty otherwise."""

    engine: str
    why: str = ""


def choose_engine(
    config: Config, model: Mapping[str, Any] | None, *, on_cuda: bool, lacking: str = ""
) -> Choice:
    """The engine of a run: the one that is named; under auto `fused` on CUDA wherever it carries out what is asked, else `peft`.

    Args:
        model: of the model's config.json; None: not known, and taken for one that fused carries out.
        lacking: what the machine lacks for fused, in words; empty where it lacks nothing.
    """
    if config.execution.engine != "auto":
        return Choice(config.execution.engine)
    if not on_cuda:
        return Choice("peft", "no CUDA GPU")
    if (beyond := config.beyond_fused()) is not None:
        what, why, _ = beyond
        return Choice("peft", f"{what}, {why}")
    if config.model.trust_remote_code and "AutoModelForCausalLM" in (
        (model or {}).get("auto_map") or {}
    ):
        return Choice("peft", "the model brings Python code of its own, fused would not run it")
    if (problem := unsupported(model or {})) is not None:
        return Choice("peft", problem)
    return Choice("peft", lacking) if lacking else Choice("fused")


def with_engine(config: Config, choice: Choice) -> Config:
    """The config with the engine that was chosen, as a run's folder has it.

    Raises ValueError where memory.* is asked for, which only fused heeds, and another engine was chosen.
    """
    memory = config.memory
    if choice.engine != "fused" and memory != MemoryConfig():
        raise ValueError(
            f"memory.profile = {memory.profile} and memory.host_gib = {memory.host_gib:g} are for the engine fused, and execution.engine = auto "
            f"chose {choice.engine} ({choice.why}): leave them out, or change what keeps fused from it"
        )
    return config.model_copy(
        update={"execution": config.execution.model_copy(update={"engine": choice.engine})}
    )


def in_words(config: Config, choice: Choice) -> str:
    """What the header says of auto's choice; empty where the engine was named."""
    if config.execution.engine != "auto":
        return ""
    return f"{choice.engine} (auto: {choice.why})" if choice.why else f"{choice.engine} (auto)"
