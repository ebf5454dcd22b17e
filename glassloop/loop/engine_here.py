"""The engine of a run on this machine.

It is chosen before a weight is read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.base.source import BaseSource, loading_errors
from glassloop.config import ALL_LINEAR, Config
from glassloop.config.arguments import with_old_engine
from glassloop.engines.adapters import (
    MLP,
    adaptable_names,
    check_parameters,
    check_targets,
    default_names,
)
from glassloop.formula.dist import gather_objects, in_turn
from glassloop.loop.launch import on_cuda
from glassloop.plan.engine import Choice, choose_engine
from glassloop.plan.split import heads_of_ranks
from glassloop.plan.support import description_of, unsupported
from glassloop.plan.targets import needs_names
from glassloop.predict.traits import FAMILIES
from glassloop.saved.checkpoint import read_state

LEAST = (8, 0)  # compute capability that fused was written and tested for


def engine_here(
    config: Config, checkpoint: Path | None, plan: Mapping[str, Any], model: Mapping[str, Any]
) -> Choice:
    """Choose the run's engine, alike on all ranks.

    All ranks take part. A resumed run keeps its own.

    Args:
        checkpoint: of the run that is resumed. plan: its plan.json; empty for a new run.
        model: the base's config.
    """
    if config.execution.engine != "auto":
        return choose_engine(config, None, on_cuda=on_cuda())
    if (before := engine_before(checkpoint, plan)) is not None:
        return Choice(before, "as the run began")
    choice = choose_engine(config, None, on_cuda=on_cuda())
    if choice.engine != "fused":
        return choice
    lacking = next(filter(None, gather_objects(lacking_here())), "")
    return choose_engine(config, model, on_cuda=True, lacking=lacking)


def check_split(config: Config, model: Mapping[str, Any], ranks: int) -> None:
    """Raise ValueError if ranks cannot share the model's heads.

    Split passes need that.

    Args:
        model: the base's config.
    """
    if config.execution.layout != "split" or unsupported(model) is not None:
        return  # fused says itself what it does not support
    of = description_of(model)
    heads_of_ranks(of.heads, of.key_heads, ranks)


def engine_before(checkpoint: Path | None, plan: Mapping[str, Any]) -> str | None:
    """The engine of the run to resume; None for a new run.

    That of its checkpoint, or else of its plan.json.
    """
    if checkpoint is not None:
        return with_old_engine(read_state(checkpoint).config)["execution"]["engine"]
    return plan.get("contract", {}).get("engine")


def with_linear_names(
    config: Config,
    source: BaseSource,
    values: Mapping[str, Any],
    first: Callable[[], AbstractContextManager[Any]],
) -> Config:
    """Name the layers of lora.targets=all-linear, from the model's structure without weights.

    A default that names layers which the model lacks is all-linear too. `values`: of the model's
    config. Raises ValueError for lora.target_parameters that the model lacks, and for targets that
    PEFT takes for its experts.
    """
    default = "targets" not in config.lora.model_fields_set
    family = FAMILIES.get(str(values.get("model_type")))
    named = ALL_LINEAR not in config.lora.targets and (
        not default or (family is not None and not family.joined)
    )
    experts = family is None and set(MLP) & set(config.lora.targets)  # may be named so
    if named and not config.lora.target_parameters and not experts:
        return config
    model = config.model

    def read() -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
        with loading_errors(model), torch.device("meta"):
            settings = AutoConfig.from_pretrained(
                source.path, revision=source.revision, trust_remote_code=model.trust_remote_code
            )
            hf = AutoModelForCausalLM.from_config(
                settings, trust_remote_code=model.trust_remote_code
            )
        if not default and ALL_LINEAR not in config.lora.targets:
            check_targets(hf, config.lora.targets)
        return adaptable_names(hf), default_names(hf), [name for name, _ in hf.named_parameters()]

    names, usual, parameters = in_turn(first, read, "reading the model's structure")
    check_parameters(config.lora, parameters)
    if ALL_LINEAR not in config.lora.targets:
        if not needs_names(config, usual):
            return config
        names = usual
    return config.model_copy(update={"lora": config.lora.model_copy(update={"targets": names})})


def lacking_here() -> str:
    """Name the first thing that this machine lacks for fused, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "fused needs triton, which is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST:
        least = ".".join(map(str, LEAST))
        return (
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, capability))}, fused needs {least}"
        )
    return ""
