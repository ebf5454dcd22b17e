"""LoRA adapters beside the linear layers of a frozen base.

W + s B A, with A (R, in) and B (out, R), both fp32, and s = alpha/r, or alpha/sqrt(r).

Legend: R rank of the adapters.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import TypeGuard

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glassloop.base.experts import expert_parameters, named_by, shape_of
from glassloop.config import LoraConfig
from glassloop.plan.targets import check_patterns, check_tokens, reach_in_words


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
    check_parameters(lora, [name for name, _ in hf.named_parameters()])
    paths = [name for name, _ in hf.named_modules() if name.rpartition(".")[2] in lora.targets]
    paths += [n for n, _ in hf.named_parameters() if named_by(n, lora.target_parameters)]
    check_patterns(lora, ", ".join(lora.targets), paths)
    check_tokens(lora, hf.config.to_dict())
    outside = outside_of_decoder(hf, lora.targets)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=_plain(lora.alpha),  # type: ignore[arg-type]
        rank_pattern=lora.ranks,
        alpha_pattern={name: _plain(alpha) for name, alpha in lora.alphas.items()},  # type: ignore[misc]
        # Whole names: PEFT knows no other where a neighbour of the parameter is in 4 bits.
        target_parameters=[
            name for name, _ in hf.named_parameters() if named_by(name, lora.target_parameters)
        ]
        or None,
        trainable_token_indices=list(lora.trainable_token_indices) or None,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        exclude_modules=excluded(hf, lora.targets, outside),
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Before activation checkpointing is on: PEFT would make embeddings require grad, which costs
    # one more gradient.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )  # peft 0.21 asks by the old name
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")  # see above
        try:
            model = peft.get_peft_model(hf, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise ValueError(
                f"lora.targets = {', '.join(lora.targets)}: PEFT cannot adapt them in "
                f"{type(hf).__name__} ({error}): name only layers outside its experts"
            ) from error
    # Without experts' tensors in 4 bits: another copy of the model does not have them.
    model.peft_config["default"].exclude_modules = outside  # type: ignore[union-attr]
    model.peft_config["default"].target_parameters = list(lora.target_parameters) or None  # type: ignore[union-attr, assignment]
    check_plain_layers(model, lora)  # type: ignore[arg-type]
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


def check_plain_layers(model: peft.PeftModel, lora: LoraConfig) -> None:
    """Raise ValueError if PEFT adapted experts that nobody named."""
    targets = lora.targets
    wrapped = [n for n in adapted_parameters(model) if not named_by(n, lora.target_parameters)]
    if wrapped:
        kind = type(model.get_base_model()).__name__
        names = [name.rpartition(".")[2] for name in targets]
        outside = [name for name in names if name not in ("gate_proj", "up_proj", "down_proj")]
        raise ValueError(
            f"lora.targets = {', '.join(targets)}: {kind} has dense layers and layers of experts "
            "under these names, and lora.target_parameters alone trains experts "
            f"({len(wrapped)} such tensors): "
            f"set lora.targets={','.join(outside) or 'q_proj,v_proj'}"
        )


def adapted_parameters(model: nn.Module) -> list[str]:
    """The model's own names of parameters that have adapters."""
    return [
        f"{re.sub(PEFT_S, '', path)}.{module.parameter_name}"
        for path, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    ]


def _plain(alpha: float) -> float:
    """An alpha as PEFT writes it: a whole number without a point."""
    return int(alpha) if alpha.is_integer() else alpha


def check_parameters(lora: LoraConfig, names: Sequence[str]) -> None:
    """Raise ValueError for a target parameter that the model lacks.

    Args:
        names: of all its parameters.
    """
    for wanted in lora.target_parameters:
        if not any(named_by(name, [wanted]) for name in names):
            ends = [".".join(name.split(".")[-3:]) for name in names if ".experts." in name]
            there = ", ".join(dict.fromkeys(ends)) or "no experts in one tensor a layer"
            raise ValueError(
                f"lora.target_parameters = {wanted}: the model has no such parameter. "
                f"It has {there}"
            )


def check_targets(hf: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise ValueError for a target that names no linear layer.

    The message names those that exist. Also for one that PEFT takes for experts: a layer of that
    name would get no adapter.
    """
    linear = linear_names(hf)
    if unknown := [target for target in targets if target not in linear]:
        raise ValueError(
            f"lora.targets = {', '.join(unknown)}: {type(hf).__name__} has no such linear layer. "
            f"It has {', '.join(linear)}. Name those, or set lora.targets=all-linear."
        )
    if taken := names_of_experts(hf, targets):
        others = [name for name in targets if name not in taken] or adaptable_names(hf)
        raise ValueError(
            f"lora.targets = {', '.join(taken)}: PEFT takes {'these' if taken[1:] else 'this'} for "
            f"experts of {type(hf).__name__}, and layers of the same name get no adapter: set "
            f"lora.targets={','.join(others)}; lora.target_parameters trains experts"
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
        if is_linear(module) and module is not head
    }
    return tuple(found)


def names_of_experts(hf: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """Those names of layers that PEFT takes for a model's experts.

    It does so for mixtures whose experts were single layers before transformers 5.
    """
    taken = []
    for name in names:
        one = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(one, model=hf, conversions=None)
        except ValueError:  # half of what is one tensor now
            taken.append(name)
        else:
            if name not in (one.target_modules or ()):
                taken.append(name)
    return tuple(taken)


def adaptable_names(hf: PreTrainedModel) -> tuple[str, ...]:
    """The layers of lora.targets=all-linear: all that PEFT can adapt."""
    names = linear_names(hf)
    taken = names_of_experts(hf, names)
    return tuple(name for name in names if name not in taken)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a layer's output is x Wᵀ and no more.

    A router of experts may be a Linear that returns what it chose: PEFT cannot add to that.
    """
    kind = type(module)
    own = kind.forward not in (nn.Linear.forward, Conv1D.forward) and kind.__name__ not in PLAIN
    other = own and kind.__module__.startswith("transformers.models.")
    return isinstance(module, nn.Linear | Conv1D) and not other


PEFT_S = r"^base_model\.model\.|\.base_layer"  # what PEFT adds to a layer's name
PLAIN = ("FalconLinear",)  # classes of transformers' models that compute x Wᵀ in other words
MLP = ("gate_proj", "up_proj", "down_proj")  # names of experts too, in most mixtures


def default_names(hf: PreTrainedModel) -> tuple[str, ...]:
    """Linear layers with an adapter by default, without Llama's names.

    All of them; of a model with experts those whose names are not also names of experts.
    """
    names = linear_names(hf)
    return (
        tuple(n for n in names if n not in MLP)
        if any(True for _ in expert_parameters(hf))
        else names
    )


def excluded(hf: PreTrainedModel, targets: tuple[str, ...], outside: str | None) -> str | None:
    """Pattern of targets' names that get no adapter; None without any.

    They lie `outside` the decoder, or hold an expert's tensor in 4 bits.
    """
    held = [name for name, _ in hf.named_modules() if ".parametrizations." in name]
    in_4_bits = any(name.rpartition(".")[2] in targets for name in held)
    patterns = [outside, r".*\.parametrizations\..*" if in_4_bits else None]
    return "|".join(filter(None, patterns)) or None


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
        if not is_linear(module) or module is head or ".lora_" in name:
            continue
        linear = isinstance(module, nn.Linear)
        size = module.in_features * module.out_features if linear else module.weight.numel()
        total += size
        if id(module) not in adapted:
            last = name.removesuffix(".base_layer").rpartition(".")[2]
            missed[last] = missed.get(last, 0) + size
    parameters = adapted_parameters(model)
    for name, _, _, weights in expert_parameters(model):
        size = shape_of(weights).numel()
        total += size
        if re.sub(PEFT_S, "", name) not in parameters:
            missed["experts"] = missed.get("experts", 0) + size
    return reach_in_words(sum(missed.values()), total, missed)
