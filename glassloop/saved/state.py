"""Adapters, optimizer state and random numbers as tensors and plain JSON.

Each has a function that checks and builds and changes nothing, so that a caller can check every
part of a run before it sets one.
"""

from __future__ import annotations

import random
import re
from typing import Any

import numpy
import torch
from torch import Tensor

from glassloop.formula.optim import FlatAdapters

BLOCK = 256  # elements that share one scale in bitsandbytes' 8-bit states
# What odd JSON can raise.
MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    RuntimeError,
    OverflowError,
    AttributeError,
)


def saved_name(name: str) -> str:
    """PEFT's name of a LoRA parameter in a saved adapter.

    Its own name without the adapter's.
    """
    return re.sub(r"\.default(\.[^.]+)?$", r"\1", name)


def adapter_matrices(adapters: FlatAdapters) -> dict[str, Tensor]:
    """fp32 copies of the adapters' matrices on the CPU.

    They have PEFT's names in a saved adapter.
    """
    flat = adapters.flat.detach().cpu()
    return {saved_name(name): place.of(flat).clone() for name, place in adapters.slices.items()}


def flat_from(matrices: dict[str, Tensor], adapters: FlatAdapters) -> Tensor:
    """Saved matrices in the flat buffer's order, (N,) fp32 on the CPU.

    Raises ValueError if they are not this model's.
    """
    flat = torch.zeros(adapters.flat.shape)
    wanted = {saved_name(name): place for name, place in adapters.slices.items()}
    if odd := wanted.keys() ^ matrices.keys():
        raise ValueError(
            f"it and this model do not have the same matrices: {', '.join(sorted(odd)[:3])}"
        )
    for name, place in wanted.items():
        matrix = matrices[name]
        if tuple(matrix.shape) != place.shape or matrix.dtype != flat.dtype:
            raise ValueError(
                f"{name} is {tuple(matrix.shape)} {matrix.dtype}, in this model "
                f"{place.shape} {flat.dtype}"
            )
        place.of(flat).copy_(matrix)
    return flat


def optimizer_state(
    optimizer: torch.optim.Optimizer, flat: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The flat parameter's state: tensors on the CPU, and plain values.

    Tensors are kept byte for byte; the values name the optimizer.
    """
    if flat.is_cuda:
        # Paged states lie in memory that the GPU may still be writing.
        torch.cuda.synchronize(flat.device)
    state = dict(optimizer.state.get(flat, {}))
    tensors = {
        name: value.detach().cpu().clone()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    values = {name: value for name, value in state.items() if name not in tensors}
    _check_tensors(optimizer, flat, tensors)
    return tensors, {
        "optimizer": type(optimizer).__name__,
        "elements": flat.numel(),
        "values": values,
    }


def built_optimizer_state(
    optimizer: Any, flat: Tensor, tensors: dict[str, Tensor], plain: Any
) -> dict[str, Any]:
    """Build the content of optimizer.state[flat]; the optimizer does not change.

    One that finds its state there makes none of its own.

    Raises:
        ValueError: the state is another optimizer's, or made for another number of elements.
    """
    if not isinstance(plain, dict) or not isinstance(plain.get("values"), dict):
        raise ValueError("malformed optimizer state: it holds no values")
    for name, here in (("optimizer", type(optimizer).__name__), ("elements", flat.numel())):
        if plain.get(name) != here:
            raise ValueError(
                f"the optimizer state has {name} = {plain.get(name)!r}, this run has {here!r}"
            )
    _check_tensors(optimizer, flat, tensors)
    built = dict(plain["values"])
    if "state1" in tensors and not isinstance(built.get("step"), int):
        raise ValueError(f"malformed optimizer state: step is {built.get('step')!r}")
    on_device = optimizer.param_groups[0].get("fused") or optimizer.param_groups[0].get(
        "capturable"
    )
    for name, tensor in tensors.items():
        if name in ("state1", "state2") and getattr(optimizer, "is_paged", False):
            # Managed memory: only bitsandbytes allocates it.
            built[name] = optimizer.get_state_buffer(flat, dtype=tensor.dtype)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)  # the GPU is filling it with zeros
            built[name].copy_(tensor)
        else:
            built[name] = tensor.to(
                "cpu" if name == "step" and not on_device else flat.device, copy=True
            )
    return built


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, flat: Tensor, built: dict[str, Any]
) -> None:
    optimizer.state.pop(flat, None)
    if built:  # empty before the first step
        optimizer.state[flat] = built


def _check_tensors(
    optimizer: torch.optim.Optimizer, flat: Tensor, tensors: dict[str, Tensor]
) -> None:
    """Raise ValueError if these are not the optimizer's tensors over `flat`.

    No tensors are right before its first step.
    """
    wanted = _wanted_tensors(type(optimizer).__name__, flat.numel(), eight_bit="qmap1" in tensors)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found and found != wanted:
        odd = ", ".join(
            sorted(
                name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
            )
        )
        raise ValueError(
            f"the optimizer state does not fit {type(optimizer).__name__} over "
            f"{flat.numel()} elements: {odd}"
        )


def _wanted_tensors(
    kind: str, size: int, eight_bit: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of an optimizer's tensors after its first step."""
    fp32, full, blocks = torch.float32, (size,), (-(-size // BLOCK),)
    if kind == "SGD":
        return {}
    if kind == "AdamW":
        return {"exp_avg": (fp32, full), "exp_avg_sq": (fp32, full), "step": (fp32, ())}
    if kind not in ("AdamW8bit", "PagedAdamW8bit"):
        raise ValueError(
            f"nothing is known of the state of the optimizer {kind}: use adamw_8bit, "
            "paged_adamw_8bit, adamw or sgd"
        )
    if not eight_bit:  # bitsandbytes keeps parameters of less than 4096 elements so
        return {"state1": (fp32, full), "state2": (fp32, full)}
    parts = {"state": (torch.uint8, full), "absmax": (fp32, blocks), "qmap": (fp32, (256,))}
    return {f"{part}{moment}": form for moment in (1, 2) for part, form in parts.items()}


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of Python, numpy, torch and a GPU.

    In plain JSON types; `device`'s own is None on a CPU.
    """
    version, internal, gauss = random.getstate()
    legacy: Any = numpy.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex()
        if device.type == "cuda"
        else None,
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set what rng_state(device) gave.

    Raises ValueError, and sets nothing, if it is malformed or of another kind of device.
    """
    set_rng(checked_rng(state, device), device)


def checked_rng(state: Any, device: torch.device) -> dict[str, Any]:
    """Try a state on spare generators; return it in their own types.

    Raises ValueError.
    """
    try:
        version, internal, gauss = state["python"]
        checked = {
            "python": (version, tuple(internal), gauss),
            "numpy": tuple(state["numpy"]),
            "torch": _octets(state["torch"]),
        }
        random.Random().setstate(checked["python"])
        numpy.random.RandomState().set_state(checked["numpy"])
        torch.Generator().set_state(checked["torch"])
        saved_on = "cpu" if state["cuda"] is None else "cuda"
        if saved_on == device.type == "cuda":
            checked["cuda"] = _octets(state["cuda"])
            torch.Generator(device).set_state(checked["cuda"])
    except MALFORMED as error:
        raise ValueError(f"malformed state of random numbers: {error}") from error
    if saved_on != device.type:
        raise ValueError(
            f"the random numbers are those of a run on {saved_on}, this rank runs on {device.type}"
        )
    return checked


def set_rng(checked: dict[str, Any], device: torch.device) -> None:
    random.setstate(checked["python"])
    numpy.random.set_state(checked["numpy"])
    torch.set_rng_state(checked["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(checked["cuda"], device)


def _octets(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
