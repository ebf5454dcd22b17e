"""Names of fields, other trainers' names for them, and nearest names."""

from __future__ import annotations

import difflib
from typing import Any, TypeGuard

from pydantic import BaseModel

from glassloop.config.config import Config

# What users of other trainers type, and what it is called here.
PEER_NAMES = {
    "per_device_train_batch_size": "batch.size",
    "micro_batch_size": "batch.size",
    "gradient_accumulation_steps": "batch.accumulation",
    "train_batch_size": "batch.rows_per_update",
    "learning_rate": "optimizer.lr",
    "loraplus_lr_ratio": "optimizer.b_lr_ratio",
    "optim": "optimizer.name",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_steps": "schedule.updates",
    "num_train_epochs": "schedule.epochs",
    "num_epochs": "schedule.epochs",
    "warmup_steps": "schedule.warmup_updates",
    "warmup_ratio": "schedule.warmup_share",
    "lr_scheduler_type": "schedule.kind",
    "lr_scheduler": "schedule.kind",
    "max_seq_length": "data.max_tokens",
    "max_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "packing": "execution.layout=packed",
    "sample_packing": "execution.layout=packed",
    "gradient_checkpointing": "execution.checkpointing",
    "use_gradient_checkpointing": "execution.checkpointing",
    "bf16": "execution.precision=bf16",
    "fp16": "execution.precision=fp16",
    "mixed_precision": "execution.precision",
    "load_in_4bit": "model.quantization=nf4",
    "model_name": "model.id",
    "model_name_or_path": "model.id",
    "base_model": "model.id",
    "dataset_name": "data.source",
    "dataset": "data.source",
    "datasets": "data.source",
    "train_on_inputs": "data.labels=everything",
    "completion_only_loss": "data.labels=response",
    "assistant_only_loss": "data.labels=response",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.rslora",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "report_to": "tracking.to",
    "wandb_project": "tracking.project",
    "output_dir": "run.dir",
    "run_name": "run.name",
    "eval_steps": "evaluation.every_updates",
    "early_stopping_patience": "evaluation.patience",
    "patience": "evaluation.patience",
    "load_best_model_at_end": "evaluation.patience",
    "save_steps": "checkpoint.every_updates",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "resume.run",
}


class ConfigError(ValueError):
    """A config that cannot be used.

    The message names each field, its value and the cure.
    """


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a field holds a section of fields."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All fields as dotted names."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        names += field_names(kind, f"{prefix}{name}.") if is_section(kind) else [prefix + name]
    return names


def unknown_name(name: str) -> str:
    """Name the field that an unknown name means, or the nearest names."""
    last = name.rsplit(".", 1)[-1]
    if last in PEER_NAMES:
        return f"{name} is not a field of glassloop: it is called {PEER_NAMES[last]} here"
    fields = field_names()
    same_end = [field for field in fields if field.rsplit(".", 1)[-1] == last]
    near = same_end or difflib.get_close_matches(name, fields, n=2, cutoff=0.5)
    near = near or [
        f
        for f in fields
        if f.rsplit(".", 1)[-1]
        in difflib.get_close_matches(last, {f.rsplit(".", 1)[-1] for f in fields}, n=1)
    ]
    hint = f": did you mean {' or '.join(near)}?" if near else ": --help lists all fields"
    return f"{name} is not a field of glassloop{hint}"


def check_names(values: dict[str, Any], model: type[BaseModel] = Config, prefix: str = "") -> None:
    """Raise ConfigError, naming them all, for names that are no field."""
    complaints: list[str] = []
    _collect_unknown(values, model, prefix, complaints)
    if complaints:
        raise ConfigError("\n".join(complaints))


def _collect_unknown(
    values: dict[str, Any], model: type[BaseModel], prefix: str, complaints: list[str]
) -> None:
    for key, value in values.items():
        info = model.model_fields.get(key) if isinstance(key, str) else None
        if info is None:
            complaints.append(unknown_name(f"{prefix}{key}"))
        elif is_section(info.annotation) and isinstance(value, dict):
            _collect_unknown(value, info.annotation, f"{prefix}{key}.", complaints)
