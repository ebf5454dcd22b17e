"""Checks of a built model before it trains.

They cover dtypes, devices, a head of plain weights, token ids, and that all ranks have one base.

Legend: H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassloop.base.one_pass import logits_and_hidden

# Fields of a config between the head's product and the logits, and how they act there. 1, 0 and
# None are no factor.
LOGIT_FACTORS = {
    "logits_scaling": "divides",
    "logit_scale": "multiplies",
    "lm_head_multiplier": "multiplies",
    "final_logit_softcapping": "caps",
    "logits_soft_cap": "caps",
}


def logit_factors(config: Any) -> tuple[float, float | None]:
    """Scale and cap between head and logits, of a config.

    Logits are scale * product; with a cap, cap * tanh(scale * product / cap).
    """
    scale, cap = 1.0, None
    for field, acts in LOGIT_FACTORS.items():
        value = getattr(config, field, None)
        if value in (None, 0, 1):
            continue
        if acts == "caps":
            cap = float(value)
        else:
            scale *= float(value) if acts == "multiplies" else 1 / float(value)
    return scale, cap


@dataclass(frozen=True)
class DtypeGroup:
    """Tensors of one kind and dtype.

    `parameters` counts logical weights (two to a byte in NF4), `size_bytes` memory.
    """

    kind: str
    dtype: str
    trainable: bool
    tensors: int
    parameters: int
    size_bytes: int


def dtype_audit(hf: nn.Module) -> list[DtypeGroup]:
    """Count parameters and NF4's scales by kind, dtype and trainability.

    Groups come in the order of first appearance.
    """
    groups: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
    for kind, tensor, parameters, trainable in _kinds(hf):
        group = groups[kind, str(tensor.dtype).removeprefix("torch."), trainable]
        for place, more in enumerate((1, parameters, tensor.numel() * tensor.element_size())):
            group[place] += more
    return [DtypeGroup(*key, *numbers) for key, numbers in groups.items()]


def audit_table(groups: list[DtypeGroup]) -> str:
    """The audit as lines of text."""
    lines = [f"{'parameters':22}{'dtype':9}{'trains':7}{'tensors':>8}{'weights':>15}{'MiB':>9}"]
    for g in groups:
        trains = "yes" if g.trainable else "no"
        size = f"{g.parameters:>15,}{g.size_bytes / 2**20:>9.1f}"
        lines.append(f"{g.kind:22}{g.dtype:9}{trains:7}{g.tensors:>8}{size}")
    return "\n".join(lines)


def unquantised_note(hf: nn.Module) -> str:
    """Count the layers' weights that NF4 leaves in 16 bits.

    A note; empty if there are none. bitsandbytes quantises linear layers. Experts that lie in one
    tensor a layer are none. Embedding, head, norms and biases stay as they are in every model.
    """
    groups = [g for g in dtype_audit(hf) if g.kind in ("experts", "other", "linear")]
    if not (count := sum(g.parameters for g in groups)):
        return ""
    kinds = ", ".join(f"{g.parameters:,} {g.kind} in {g.dtype}" for g in groups)
    size = sum(g.size_bytes for g in groups) / 2**30
    return f"NF4 leaves {count:,} weights of the layers unquantised ({kinds}): {size:.2f} GiB"


def check_token_ids(
    rows: Iterable[tuple[str, Sequence[int]]],
    others: Mapping[str, int | None],
    size: int,
    tokenizer: Any,
    model_id: str,
) -> None:
    """Raise ValueError for a token id that the embedding does not have.

    Args:
        rows: id and token ids of every row. others: what else is fed to the model, by its name.
        size: rows of the embedding.
    """
    cure = (
        "the tokenizer knows more tokens than the model was resized for; take the tokenizer that "
        "belongs to the model, or a model with resized embeddings"
    )
    for name, token in others.items():
        if token is not None and token >= size:
            raise ValueError(
                f"model.id = {model_id}: the {name} token "
                f"{tokenizer.convert_ids_to_tokens(token)!r} "
                f"has id {token}, and the embedding has {size} rows: {cure}"
            )
    odd = [(row_id, token) for row_id, ids in rows if (token := max(ids)) >= size]
    if odd:
        (row_id, token), count = odd[0], len(odd)
        raise ValueError(
            f"model.id = {model_id}: token {tokenizer.convert_ids_to_tokens(token)!r} of row "
            f"{row_id} "
            f"has id {token}, and the embedding has {size} rows ({count} rows hold such tokens): "
            f"{cure}"
        )


def check_dtypes(hf: nn.Module, precision: str) -> None:
    """Refuse trainables that are not fp32, and fp32 that nobody asked for.

    Trainables in 16 bits lose small steps to rounding in bf16, and cannot be unscaled in fp16 (peft
    issue 341). fp32 copies of the 16-bit embedding and head cost 2 GB on an 8B model and change
    nothing (peft issue 816). Raises ValueError naming the tensor; norms may be fp32.
    """
    kept = tuple(getattr(_base(hf), "_keep_in_fp32_modules", None) or ()) + tuple(
        getattr(_base(hf), "_keep_in_fp32_modules_strict", None) or ()
    )
    for name, kind, parameter in named_kinds(hf):
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} trains in {parameter.dtype}, but execution.precision = {precision} needs "
                "fp32 trainables: "
                "load adapters with autocast_adapter_dtype, or convert them to fp32"
            )
        asked = (
            parameter.requires_grad
            or precision == "fp32"
            or kind == "norm"
            or any(part in name.split(".") for part in kept)
        )
        if parameter.dtype == torch.float32 and not asked:
            raise ValueError(
                f"{name} ({kind}) is fp32 although execution.precision = {precision}: only norms "
                "may be; "
                "do not prepare the model for k-bit training, or set execution.precision=fp32"
            )


def check_devices(hf: nn.Module, device: torch.device, *, but: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless all tensors lie on this rank's own device.

    `but`: last parts of the names of buffers that need not.
    """
    own = _indexed(device)
    buffers = [
        (name, tensor) for name, tensor in hf.named_buffers() if name.rpartition(".")[2] not in but
    ]
    for name, tensor in [*hf.named_parameters(), *buffers]:
        if _indexed(tensor.device) != own:
            raise ValueError(
                f"{name} lies on {tensor.device}, but this rank owns {own}: device_map='auto' "
                "splits a model over GPUs and leaves one "
                "rank; load with device_map={'': the rank's device}"
            )


@torch.no_grad()
def check_unpatched(base: nn.Module, engine: str) -> None:
    """Raise ValueError if unsloth has patched transformers in this process."""
    for name, module in base.named_modules():
        for origin in (type(module).__module__, getattr(type(module).forward, "__module__", "")):
            if origin.startswith("unsloth"):
                raise ValueError(
                    f"execution.engine = {engine}: {name or 'the model'} is {origin}'s, since "
                    "unsloth was imported in this process and patched "
                    "transformers for all of it: start a process of its own"
                )


def check_plain_head(hf: nn.Module, device: torch.device, model_id: str) -> None:
    """Raise ValueError unless logits are head(decoder(x)) with `logit_factors`, and finite.

    The loss is computed from hidden states and the head's weight, chunk by chunk, so any other
    factor and a quantised head would be left out. Four tokens go through both ways. `model_id` is
    named in the message.
    """
    config = hf.config.get_text_config()  # type: ignore[union-attr, operator]
    head, decoder = hf.get_output_embeddings(), hf.get_decoder()  # type: ignore[operator]
    name = type(hf).__name__
    if decoder is None or decoder is hf:
        raise ValueError(
            f"{name} does not tell its decoder from its head, which execution.engine = peft "
            "relies on: take another model"
        )
    if head is None or type(head) is not nn.Linear:
        raise ValueError(
            f"{name} has no head of plain weights ({type(head).__name__}): take a model whose "
            "head is an unquantised nn.Linear"
        )
    ids = torch.arange(1, 5, device=device).unsqueeze(0) % config.vocab_size  # (1, 4)
    was_training = hf.training
    hf.eval()
    logits, hidden = logits_and_hidden(hf, decoder, ids)  # (1, 4, V), (1, 4, H)
    hf.train(was_training)
    logits = logits.float()
    if not bool(logits.isfinite().all()):
        raise ValueError(_not_finite(hf, model_id, head.weight.dtype))
    scale, cap = logit_factors(config)
    plain = F.linear(hidden, head.weight, head.bias).float() * scale
    plain = plain if cap is None else cap * torch.tanh(plain / cap)
    if plain.shape != logits.shape or not torch.allclose(
        plain, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())
    ):
        raise ValueError(
            f"the logits of {name} are not head(decoder(x)), which execution.engine = peft relies "
            "on: take another model"
        )


def _not_finite(hf: nn.Module, model_id: str, dtype: torch.dtype) -> str:
    """Explain infinite or NaN logits, by the weight at fault."""
    for name, tensor in hf.named_parameters():
        state: Any = getattr(
            tensor, "quant_state", None
        )  # of NF4: the weight itself is codes, its scales tell
        parts = (
            [tensor]
            if state is None
            else [
                state.absmax,
                *([] if state.offset is None else [state.offset, state.state2.absmax]),
            ]
        )
        if not all(bool(part.isfinite().all()) for part in parts):
            return (
                f"model.id = {model_id} holds infinite or NaN numbers in {name}: take an "
                "undamaged copy of the model"
            )
    cure = (
        "set execution.precision=bf16 or fp32" if dtype == torch.float16 else "take another model"
    )
    return (
        f"model.id = {model_id} computes logits that are not finite from finite weights in "
        f"{str(dtype).removeprefix('torch.')}: {cure}"
    )


def named_kinds(hf: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (name, kind, parameter) of every parameter; a tied one comes twice."""
    head = _base(hf).get_output_embeddings()  # type: ignore[operator]
    for path, module in hf.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            yield full, _kind(full, name, module, is_head=module is head), parameter


def _kind(full: str, name: str, module: nn.Module, is_head: bool) -> str:
    if "lora_A" in full:
        return "adapter A"
    if "lora_B" in full:
        return "adapter B"
    if "trainable_tokens_delta" in full:
        return "trained embedding"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_head:
        return "head"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if name == "bias":
        return "bias"
    if hasattr(module, "quant_state"):
        return "quantised linear"
    if isinstance(module, nn.Linear):
        return "linear"
    if "experts" not in full.split("."):
        return "other"
    return "quantised experts" if full.endswith(".original") else "experts"


def _kinds(hf: nn.Module) -> Iterator[tuple[str, Tensor, int, bool]]:
    seen: set[int] = set()
    for _, kind, parameter in named_kinds(hf):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        state: Any = getattr(parameter, "quant_state", None)
        yield (
            kind,
            parameter,
            state.shape.numel() if state is not None else parameter.numel(),
            parameter.requires_grad,
        )
        for scales in _scales(state):
            yield "quantisation scales", scales, 0, False


def _scales(state: Any) -> list[Tensor]:
    if state is None:
        return []
    return [state.absmax, *([state.state2.absmax] if state.nested else [])]


def _base(hf: nn.Module) -> nn.Module:
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf  # type: ignore[operator]


def _indexed(device: torch.device) -> torch.device:
    """cuda -> cuda:<current>, so that two names of one device are equal."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
