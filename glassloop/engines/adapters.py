"""LoRA adapters beside the linear layers of a frozen base: W + (alpha/r) B A, A (R, in), B (out, R), both fp32.

Legend: R rank of the adapters.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glassloop.config.config import LoraConfig

PLAIN = {  # fields of adapter_config.json that change what an adapter computes, and the value that plain LoRA has
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def attach_lora(
    hf: PreTrainedModel, lora: LoraConfig, *, seed: int, base_name: str, commit: str | None
) -> peft.PeftModel:
    """Wrap the base with fresh adapters: A uniform (Kaiming, a = sqrt 5), B zero, so that training starts at the base's own function.

    A is drawn on the CPU from a generator of its own, layer by layer: `seed` gives the same adapters on every rank and device.
    `base_name` and `commit` go into adapter_config.json. Raises ValueError for targets that the model does not have.
    """
    check_targets(hf, lora.targets)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Before activation checkpointing is switched on: PEFT would then make embeddings require grad, at the price of one more gradient.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )  # peft 0.21 asks by the old name
        model = peft.get_peft_model(hf, config, autocast_adapter_dtype=True)
    draw_adapters(model, seed=seed, base_name=base_name, commit=commit)  # type: ignore[arg-type]
    return model  # type: ignore[return-value]


def draw_adapters(model: peft.PeftModel, *, seed: int, base_name: str, commit: str | None) -> None:
    """Put the first values into fresh adapters (see attach_lora), and the base's name into what adapter_config.json will say."""
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base_name, commit
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)


def check_targets(hf: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise ValueError, with the names that exist, for a target that names no linear layer."""
    linear = linear_names(hf)
    if unknown := [target for target in targets if target not in linear]:
        raise ValueError(
            f"lora.targets = {', '.join(unknown)}: {type(hf).__name__} has no such linear layer. "
            f"It has {', '.join(linear)}. Name those, or set lora.targets=all-linear."
        )


def linear_names(hf: PreTrainedModel) -> tuple[str, ...]:
    """Last parts of the names of all linear layers but the head, in the model's order."""
    head = hf.get_output_embeddings()
    found = {
        name.rpartition(".")[2]: None
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return tuple(found)


def load_adapter(
    model: peft.PeftModel, folder: str, lora: LoraConfig, *, base_name: str, commit: str | None
) -> None:
    """Put the weights of a saved PEFT LoRA adapter into the fresh ones.

    Raises ValueError naming model.init_adapter and every difference between its adapter_config.json and the run's config: kind, r,
    alpha, targets, base, revision, or a variant of LoRA that is not trained here.
    """
    path = Path(folder).expanduser()
    try:
        saved: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"model.init_adapter = {folder} has no adapter_config.json: name the folder of a PEFT adapter"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"model.init_adapter = {folder}: adapter_config.json is not JSON ({error}): take an undamaged adapter"
        ) from error
    if not isinstance(saved, dict):
        raise ValueError(
            f"model.init_adapter = {folder}: adapter_config.json holds no fields: take an undamaged adapter"
        )
    differences = adapter_differences(saved, lora, base_name=base_name, commit=commit)
    if differences:
        raise ValueError(
            f"model.init_adapter = {folder} does not fit this run: {'; '.join(differences)}"
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"model.init_adapter = {folder} has no adapter_model.safetensors, and pickled weights (adapter_model.bin) are not read: "
            "load it in PEFT where you trust it, and save it again"
        )
    try:
        weights = peft.load_peft_weights(str(path), device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"model.init_adapter = {folder}: its weights cannot be read ({error}): take an undamaged adapter"
        ) from error
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(weights.keys() ^ expected.keys()) or sorted(
        n for n in weights if weights[n].shape != expected[n].shape
    )
    if odd:
        raise ValueError(
            f"model.init_adapter = {folder}: {len(odd)} tensors are missing, unknown or of another shape ({', '.join(odd[:3])})"
        )
    peft.set_peft_model_state_dict(model, weights)


def adapter_differences(
    saved: dict[str, Any], lora: LoraConfig, *, base_name: str, commit: str | None
) -> list[str]:
    """What in a saved adapter_config.json contradicts the run's config, each as 'field: there, here'."""
    if saved.get("peft_type") != "LORA":
        return [f"peft_type is {saved.get('peft_type')}, only LORA is trained here"]
    targets = saved.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else targets
    fields = {
        "lora.r": (saved.get("r"), lora.r),
        "lora.alpha": (saved.get("lora_alpha"), lora.alpha),
        "lora.targets": (sorted(targets), sorted(lora.targets)),
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
    differences += [
        f"{field} is {saved[field]}, not trained here"
        for field, plain in PLAIN.items()
        if (saved.get(field) or plain) != plain
    ]
    return differences
