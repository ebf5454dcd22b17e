"""The engine that a plan is made for: under `execution.engine=auto` the one that a CUDA GPU would get. Imports nothing heavy."""

from __future__ import annotations

from glassloop.config.config import Config
from glassloop.plan.engine import choose_engine, with_engine
from glassloop.predict.shapes import config_values


def planned_engine(config: Config) -> tuple[Config, str]:
    """The config with the engine that it would get on CUDA, and what to say of that.

    Raises ValueError for fields that the chosen engine does not heed.
    """
    model = config_values(config.model.id)
    choice = choose_engine(config, model, on_cuda=True)
    if config.execution.engine != "auto":
        return config, choice.engine
    said = f"auto: {choice.engine} on CUDA"
    if choice.engine == "peft":
        said += f" too ({choice.why})"
    elif model is None:
        said += (
            ", if it is a model that fused carries out (its config.json is not here); peft on a CPU"
        )
    else:
        said += ", peft on a CPU"
    return with_engine(config, choice), said
