"""LoRA adapters beside the linear layers of a frozen base.

W + s B A, with A (R, in) and B (out, R), both fp32, and s = alpha/r, or alpha/sqrt(r).

Legend: R rank of the adapters.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glassloop.config import LoraConfig
from glassloop.plan.targets import reach_in_words

# Fields of adapter_config.json that do not change what a trained adapter computes. Every other one
# must be as in the run's own, those that a newer PEFT has included.
NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")  # by initialising
CONFIG_BYTES = 1 << 20  # of adapter_config.json, at most


def attach_lora(
    hf: PreTrainedModel, lora: LoraConfig, *, seed: int, base_name: str, commit: str | None
) -> peft.PeftModel:
    """Wrap the base with fresh adapters: A uniform, B zero.

    Training so starts at the base's own function (A: Kaiming, a = sqrt 5). A is drawn on the CPU
    from a generator of its own, layer by layer: `seed` gives the same adapters on every rank and
    device. `base_name` and `commit` go into adapter_config.json. Raises ValueError for targets that
    the model does not have.
    """
    check_targets(hf, lora.targets)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        exclude_modules=outside_of_decoder(hf, lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Before activation checkpointing is on: PEFT would make embeddings require grad, which costs
    # one more gradient.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )  # peft 0.21 asks by the old name
        try:
            model = peft.get_peft_model(hf, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise ValueError(
                f"lora.targets = {', '.join(lora.targets)}: PEFT cannot adapt them in "
                f"{type(hf).__name__} ({error}): name only layers outside its experts"
            ) from error
    check_plain_layers(model, lora.targets)  # type: ignore[arg-type]
    draw_adapters(model, seed=seed, base_name=base_name, commit=commit)  # type: ignore[arg-type]
    return model  # type: ignore[return-value]


def draw_adapters(model: peft.PeftModel, *, seed: int, base_name: str, commit: str | None) -> None:
    """Draw the first values of fresh adapters (see attach_lora).

    The base's name goes into what adapter_config.json will say.
    """
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base_name, commit
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)


def check_plain_layers(model: peft.PeftModel, targets: tuple[str, ...]) -> None:
    """Raise ValueError if PEFT adapted a layer's experts."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    if wrapped:
        kind = type(model.get_base_model()).__name__
        names = [name.rpartition(".")[2] for name in targets]
        outside = [name for name in names if name not in ("gate_proj", "up_proj", "down_proj")]
        raise ValueError(
            f"lora.targets = {', '.join(targets)}: {kind} has dense layers and layers of experts "
            f"under these names, and experts are not trained here ({len(wrapped)} such tensors): "
            f"set lora.targets={','.join(outside) or 'q_proj,v_proj'}"
        )


def check_targets(hf: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise ValueError for a target that names no linear layer.

    The message names those that exist.
    """
    linear = linear_names(hf)
    if unknown := [target for target in targets if target not in linear]:
        raise ValueError(
            f"lora.targets = {', '.join(unknown)}: {type(hf).__name__} has no such linear layer. "
            f"It has {', '.join(linear)}. Name those, or set lora.targets=all-linear."
        )


def linear_names(hf: PreTrainedModel) -> tuple[str, ...]:
    """Last parts of the names of the decoder's linear layers.

    In the model's order.

    Neither the head nor a part for images or sound has any.
    """
    head, decoder = hf.get_output_embeddings(), hf.get_decoder() or hf
    found = {
        name.rpartition(".")[2]: None
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return tuple(found)


MLP = ("gate_proj", "up_proj", "down_proj")  # names that PEFT takes for a layer's experts too


def expert_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of experts that lie in one tensor a layer."""
    return [p for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]


def default_names(hf: PreTrainedModel) -> tuple[str, ...]:
    """Linear layers with an adapter by default, without Llama's names.

    All of them; of a model with experts those whose names are not also names of experts.
    """
    names = linear_names(hf)
    return tuple(n for n in names if n not in MLP) if expert_weights(hf) else names


def outside_of_decoder(hf: PreTrainedModel, targets: tuple[str, ...]) -> str | None:
    """Pattern of names outside the decoder; None without a target there.

    A model for images has layers of the same names, which no row of text reaches.
    """
    decoder = hf.get_decoder()
    path = next((name for name, module in hf.named_modules() if module is decoder), "")
    others = (name for name, _ in hf.named_modules() if not f"{name}.".startswith(f"{path}."))
    if not path or not any(name.rpartition(".")[2] in targets for name in others):
        return None
    return rf"(?!{re.escape(path)}\.).*"


def reach_note(model: nn.Module, head: nn.Module | None) -> str:
    """Count linear weights without an adapter, by the layers' names.

    Empty if all have one.

    Experts that lie in one tensor a layer count as linear weights.
    """
    adapted = {id(one.base_layer) for one in model.modules() if hasattr(one, "lora_A")}
    total, missed = 0, dict[str, int]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head or ".lora_" in name:
            continue
        linear = isinstance(module, nn.Linear)
        size = module.in_features * module.out_features if linear else module.weight.numel()
        total += size
        if id(module) not in adapted:
            last = name.removesuffix(".base_layer").rpartition(".")[2]
            missed[last] = missed.get(last, 0) + size
    if experts := sum(p.numel() for p in expert_weights(model)):
        total, missed["experts"] = total + experts, experts
    return reach_in_words(sum(missed.values()), total, missed)


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
