"""Weights of a saved LoRA adapter to begin from: model.init_adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open

from glassloop.config import LoraConfig

# Fields of adapter_config.json that do not change what a trained adapter computes. Every other one
# must be as in the run's own, those that a newer PEFT has included.
NO_MATTER = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
}
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")  # by initialising
CONFIG_BYTES = 1 << 20  # of adapter_config.json, at most


def load_adapter(
    model: peft.PeftModel, folder: str, lora: LoraConfig, *, base_name: str, commit: str | None
) -> None:
    """Put the weights of a saved LoRA adapter into fresh ones.

    Raises ValueError naming model.init_adapter: a file is missing, damaged or too large, weights
    are not finite, or adapter_config.json differs from the run's config (every difference is
    named).
    """
    path = Path(folder).expanduser()
    saved = _saved_config(path, folder)
    own = model.peft_config["default"].to_dict()
    differences = adapter_differences(saved, own, lora, base_name=base_name, commit=commit)
    if differences:
        raise ValueError(
            f"model.init_adapter = {folder} does not fit this run: {'; '.join(differences)}"
        )
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"model.init_adapter = {folder} has no adapter_model.safetensors, and pickled weights "
            "(adapter_model.bin) are not read: load it in PEFT if you trust it, and save it again"
        )
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    peft.set_peft_model_state_dict(model, _weights(file, folder, expected))


def _saved_config(path: Path, folder: str) -> dict[str, Any]:
    """Read adapter_config.json as plain fields. Raises ValueError naming model.init_adapter."""
    file = path / "adapter_config.json"
    if not file.is_file():
        raise ValueError(
            f"model.init_adapter = {folder} has no adapter_config.json: "
            "name the folder of a PEFT adapter"
        )
    damaged = f"model.init_adapter = {folder}: adapter_config.json"
    if (size := file.stat().st_size) > CONFIG_BYTES:
        raise ValueError(f"{damaged} has {size:,} bytes: take an undamaged adapter")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged} is not JSON ({error}): take an undamaged adapter") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{damaged} holds no fields: take an undamaged adapter")
    return saved


def _weights(file: Path, folder: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors.

    Names and shapes are compared before any is read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  (not a dict)
            odd = sorted(shapes.keys() ^ expected.keys()) or sorted(
                name for name in shapes if shapes[name] != tuple(expected[name].shape)
            )
            if odd:
                raise ValueError(
                    f"model.init_adapter = {folder}: {len(odd)} tensors are missing, unknown or of "
                    f"another shape ({', '.join(odd[:3])})"
                )
            weights = {name: tensors.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"model.init_adapter = {folder}: its weights cannot be read ({error}): "
            "take an undamaged adapter"
        ) from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise ValueError(
                f"model.init_adapter = {folder}: {name} holds values that are no finite numbers "
                f"({str(tensor.dtype).removeprefix('torch.')}): take an undamaged adapter"
            )
    return weights


def adapter_differences(
    saved: dict[str, Any],
    own: dict[str, Any],
    lora: LoraConfig,
    *,
    base_name: str,
    commit: str | None,
) -> list[str]:
    """Contradictions of a saved adapter_config.json with the run's.

    Each is 'field: there, here'. own: the fields of the adapter that this run has made.
    """
    if saved.get("peft_type") != "LORA":
        return [f"peft_type is {saved.get('peft_type')}, only LORA is trained here"]
    targets = saved.get("target_modules") or []
    names = targets if isinstance(targets, list) else [targets]
    fields = {
        "lora.r": (saved.get("r"), lora.r),
        "lora.alpha": (saved.get("lora_alpha"), lora.alpha),
        "lora.rslora": (bool(saved.get("use_rslora")), lora.rslora),
        "lora.rank_pattern": (saved.get("rank_pattern") or {}, lora.ranks),
        "lora.alpha_pattern": (saved.get("alpha_pattern") or {}, lora.alphas),
        "lora.target_parameters": (
            sorted(saved.get("target_parameters") or []),
            sorted(lora.target_parameters),
        ),
        "lora.trainable_token_indices": (
            saved.get("trainable_token_indices") or [],
            list(lora.trainable_token_indices),
        ),
        "lora.targets": (sorted(map(str, names)), sorted(lora.targets)),
    }
    differences = [
        f"{field} is {there} in the adapter, {here} in the config"
        for field, (there, here) in fields.items()
        if there != here
    ]
    saved_base = saved.get("base_model_name_or_path")
    if saved_base and saved_base != base_name:
        differences.append(f"it was trained on {saved_base}, model.id gives {base_name}")
    elif saved.get("revision") and commit and saved["revision"] != commit:
        differences.append(
            f"it was trained on commit {saved['revision']}, model.revision gives {commit}"
        )
    if str(saved.get("init_lora_weights")).startswith(CHANGES_THE_BASE):
        differences.append(
            f"init_lora_weights is {saved['init_lora_weights']}: it changes the base"
        )
    differences += [
        f"{field} is {value}, not trained here"
        for field, value in saved.items()
        if field not in NO_MATTER and value and value != own.get(field)
    ]
    return differences
