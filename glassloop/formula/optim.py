"""One flat fp32 buffer of all adapters, its optimizer, fp16's loss scale.

Every engine trains this buffer: PEFT's parameters and their gradients are views of it, so one
reduction, one norm and one optimizer launch
serve them all, and the 8-bit state is one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = (
    256  # elements of one block of bitsandbytes' 8-bit states: no block holds parts of two tensors
)
# Elements whose norm or checksum is taken at a time: 8 bytes each in a copy. Large enough that the
# adapters of an 8B at r = 16 are one piece.
PIECE = 1 << 26


@dataclass(frozen=True)
class Slice:
    """The place of one adapter matrix in the flat buffer."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The matrix, as a view of a tensor like the flat buffer."""
        return flat[self.offset : self.offset + self.size].view(self.shape)


class FlatAdapters:
    """All trainable parameters as views of one vector.

    Attributes:
        flat: (N,) fp32 Parameter. Padding between matrices belongs to nobody: an 8-bit state has no
            exact 0, so it may drift a little.
        grad: (N,) fp32; `flat.grad` is this tensor, and each parameter's `.grad` a view of it.
        slices: name -> Slice, in the model's order.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]):
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: lora.targets matched no layer")
        self.slices: dict[str, Slice] = {}
        offset = 0
        for name, p in self.parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {p.dtype}: adapters are trained in fp32, or small steps "
                    "are rounded away"
                )
            self.slices[name] = Slice(offset, tuple(p.shape))
            offset += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(self.parameters.values())).device
        self.flat = nn.Parameter(torch.zeros(offset, device=device))
        self.grad = torch.zeros(offset, device=device)
        self.flat.grad = self.grad
        for name, p in self.parameters.items():
            view = self.slices[name].of(self.flat.data)
            view.copy_(p.data)
            p.data = view
            p.grad = self.slices[name].of(self.grad)

    @property
    def trainable(self) -> int:
        """Trainable parameters, padding not counted."""
        return sum(s.size for s in self.slices.values())

    def zero_grad(self) -> None:
        """Set every gradient to 0 and keep the views.

        An optimizer's own zero_grad drops them.
        """
        self.grad.zero_()

    def check_views(self) -> None:
        """Raise RuntimeError if a parameter or gradient left the flat buffers."""
        for name, p in self.parameters.items():
            place = self.slices[name]
            if p.data_ptr() != place.of(self.flat.data).data_ptr():
                raise RuntimeError(f"{name} left the flat buffer: something replaced its data")
            if p.grad is None or p.grad.data_ptr() != place.of(self.grad).data_ptr():
                raise RuntimeError(
                    f"the gradient of {name} left the flat buffer: something replaced or dropped it"
                )

    def checksum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Checksum of adapters and optimizer state, () int64 below 2**48.

        Exact in any order of adding; equal on replicas that agree.
        """
        tensors = [self.flat.data, *(value for _, value in state_tensors(optimizer, self.flat))]
        total = torch.zeros((), dtype=torch.int64, device=self.flat.device)
        for index, tensor in enumerate(tensors):  # weights, so that two that were exchanged show
            total += (2 * index + 1) * bit_sum(tensor).to(total.device)
        return total % (1 << 48)

    def parts(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """The tensors that replicas share, as (name, flat view).

        Each adapter matrix and its optimizer state, in the model's order.
        """
        tensors = state_tensors(optimizer, self.flat)
        found = []
        for name, place in self.slices.items():
            found.append((name, place.of(self.flat.data).flatten()))
            for kind, tensor in tensors:
                # Elements that one entry serves: 1, or a block's.
                step = self.flat.numel() // max(tensor.numel(), 1)
                if not kind.startswith("qmap"):  # constant tables of bitsandbytes
                    found.append(
                        (
                            f"{kind} of {name}",
                            tensor[place.offset // step : -(-(place.offset + place.size) // step)],
                        )
                    )
        return found


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits, read as integers, () int64.

    The integers have 4 bytes if the tensor's size allows it, else 1.
    """
    bits = tensor.detach().reshape(-1)
    if bits.numel() * bits.element_size() % 4 == 0:
        bits = bits.view(torch.int32)
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(PIECE)]).sum()


def state_tensors(optimizer: torch.optim.Optimizer, flat: Tensor) -> list[tuple[str, Tensor]]:
    """An optimizer's state over the flat buffer, as (kind, tensor) by kind.

    Empty before its first step.
    """
    return sorted(
        (kind, value)
        for kind, value in optimizer.state.get(flat, {}).items()
        if isinstance(value, Tensor)
    )


def l2_norm(flat: Tensor) -> Tensor:
    """L2 norm of a flat vector, () float64.

    It is accumulated in float64: fp32 is off by 3e-3 at 42 M entries on a CPU. A vector above PIECE
    is taken in parts, because torch copies what it accumulates in another type.
    """
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in flat.split(PIECE)]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))


def make_optimizer(
    name: str,
    flat: nn.Parameter,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    b_lr_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """Make the optimizer over the flat buffer.

    adamw_8bit and paged_adamw_8bit are bitsandbytes', adamw and sgd torch's. `b_lr_ratio`: for
    `step`, which finds it in the optimizer's group.
    """
    betas = (beta1, beta2)
    if name == "sgd":
        made = torch.optim.SGD([flat], lr=lr, weight_decay=weight_decay)
    elif name == "adamw":
        made = torch.optim.AdamW(
            [flat], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
    else:
        made = _of_bitsandbytes(name, flat)(
            [flat], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
    made.param_groups[0]["b_lr_ratio"] = b_lr_ratio
    return made


def _of_bitsandbytes(name: str, flat: nn.Parameter) -> Any:
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    if name == "paged_adamw_8bit" and not flat.is_cuda:
        raise ValueError("optimizer.name = paged_adamw_8bit needs a CUDA device: use adamw_8bit")
    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}
    return kinds[name]


def b_lr_of(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of B (LoRA+); None if it is A's."""
    group = optimizer.param_groups[0]
    ratio = group.get("b_lr_ratio", 1.0)
    return None if ratio == 1 else group["lr"] * ratio


def step(optimizer: torch.optim.Optimizer, adapters: FlatAdapters) -> None:
    """theta <- optimizer(theta, gradient), B at its own learning rate.

    The change of theta is lr times what does not depend on lr, weight decay included, in every
    optimizer here. So B's part of the change is multiplied by the ratio of the two rates.
    """
    ratio = optimizer.param_groups[0].get("b_lr_ratio", 1.0)
    if ratio == 1:
        optimizer.step()
        return
    places = [place for name, place in adapters.slices.items() if ".lora_B." in name]
    now = [place.of(adapters.flat.data) for place in places]
    before = [one.clone() for one in now]
    optimizer.step()
    for old, new in zip(before, now, strict=True):
        new.copy_(old.lerp_(new, ratio))  # old + ratio * (new - old)


class LossScale:
    """fp16's dynamic loss scale.

    Halved on overflow, doubled after `growth_updates` finite updates in a row. Without fp16 it is 1
    and stays so.
    """

    def __init__(self, initial: float, growth_updates: int, enabled: bool):
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self.growth_updates = growth_updates
        self.finite_updates = 0

    def after(self, finite: bool) -> None:
        """Note whether the update's gradient was finite."""
        if not self.enabled:
            return
        self.finite_updates = self.finite_updates + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.finite_updates == self.growth_updates:
            self.value, self.finite_updates = self.value * 2, 0
