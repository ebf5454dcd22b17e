"""RMS norms of a transformers model through torch's own kernel.

One launch replaces six, and backward keeps no fp32 copies of the activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse_norms(model: nn.Module) -> int:
    """Let RMS norms compute with torch's rms_norm; returns how many.

    A module counts as one if its class is called ...RMSNorm and it gives, on a random fp32 input,
    what torch's does: weight * x / rms(x). Others (Gemma's, which adds 1 to its weight) stay as
    they are. The result is rounded once to the input's dtype; transformers rounds twice.
    """
    fused = 0
    for module in model.modules():
        weight, eps = (
            getattr(module, "weight", None),
            getattr(module, "variance_epsilon", getattr(module, "eps", None)),
        )
        if (
            not type(module).__name__.endswith("RMSNorm")
            or not isinstance(weight, Tensor)
            or not isinstance(eps, float)
        ):
            continue
        if weight.ndim == 1 and _agrees(module, weight, eps):
            module.forward = _Fused(module.forward, weight, eps)
            fused += 1
    return fused


class _Fused:
    """A norm's forward.

    The module's own computes if input and weight differ in dtype.
    """

    def __init__(self, own_forward, weight: Tensor, eps: float):
        self.own_forward, self.weight, self.eps = own_forward, weight, eps

    def __call__(self, x: Tensor) -> Tensor:  # (..., H)
        if x.dtype != self.weight.dtype:
            return self.own_forward(x)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # autocast would compute, and return, fp32
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@torch.no_grad()
def _agrees(module: nn.Module, weight: Tensor, eps: float) -> bool:
    x = torch.linspace(-2.0, 3.0, 2 * len(weight), device=weight.device).view(2, -1)  # (2, H)
    own, ours = module(x), F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return own.shape == ours.shape and torch.allclose(
        own.float(), ours, rtol=1e-2 if weight.dtype != torch.float32 else 1e-5
    )
