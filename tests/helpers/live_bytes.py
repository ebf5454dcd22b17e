"""Count the bytes that live at once while an engine computes.

On a CPU, with a GPU's allocations.

Stand-ins with a GPU's allocations replace what a CPU allocates otherwise: 16-bit dequantisation by
bitsandbytes, fused RMS norms, flash attention with its saved log-sum-exp. Values are wrong, sizes
are right.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import bitsandbytes
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from glassloop.data.rows import Pass
from glassloop.engines import norms
from glassloop.formula.optim import FlatAdapters

# Products with the room that they take, and without the multiplication.
PRODUCTS = {
    torch.ops.aten.mm.default: lambda a, b: a.new_empty(len(a), b.shape[1]),
    torch.ops.aten.mm.out: lambda a, b, *, out: out,
}


class Live(TorchDispatchMode):
    """Count the storages that operations make, until they are freed.

    Storages of `known` do not count.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = PRODUCTS.get(func, func)(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size

    def take_peak(self) -> int:
        peak, self.peak = self.peak, self.live
        return peak


def peaks(engine, adapters: FlatAdapters, p: Pass, *, autocast: bool) -> dict[str, int]:
    """Peak bytes of a pass's forward, logits and backward.

    Base and flat buffers do not count.
    """
    with as_on_a_gpu():
        live = Live(
            [*engine.parameters(), *engine.buffers(), adapters.flat, adapters.grad, *vars_of(p)]
        )
        found: dict[str, int] = {}
        decoder = engine.hf.get_base_model().get_decoder()
        hook = decoder.register_forward_hook(
            lambda *_: found.__setitem__("forward", live.take_peak())
        )
        with live:
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                loss_sum, _ = engine(p)
            found["logits"] = live.take_peak()
            loss_sum.backward()
            found["backward"] = live.take_peak()
        hook.remove()
        adapters.zero_grad()
    return found


def vars_of(p: Pass) -> list[torch.Tensor]:
    return [value for value in vars(p).values() if isinstance(value, torch.Tensor)]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    asked = torch.is_autocast_enabled
    with (
        patch.object(
            bitsandbytes,
            "matmul_4bit",
            lambda a, b, quant_state, bias=None, out=None: _Matmul4bit.apply(
                a, b.detach(), quant_state
            ),
        ),
        patch.object(norms._Fused, "__call__", lambda self, x: _Norm.apply(x, self.weight)),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _sdpa),
        patch.object(
            torch, "is_autocast_enabled", lambda device="cpu": asked("cpu")
        ),  # PEFT asks for a GPU's
    ):
        yield


class _Matmul4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, state):
        ctx.save_for_backward(packed)
        ctx.state = state
        return torch.nn.functional.linear(x, _dequantized(state, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ _dequantized(ctx.state, grad.dtype), None, None


def _dequantized(state, dtype: torch.dtype) -> torch.Tensor:
    scales = torch.zeros(state.shape.numel() // 64)  # held while the weight is made
    return torch.zeros(state.shape, dtype=dtype).add_(scales[0])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x).copy_(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad).copy_(grad), None


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, tokens, width = q.shape
        out = (
            torch.empty(batch, tokens, heads, width, dtype=q.dtype)
            .copy_(q.transpose(1, 2))
            .transpose(1, 2)
        )
        ctx.save_for_backward(q, k, v, out, torch.empty(batch, heads, tokens))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, *_ = ctx.saved_tensors
        sums = torch.empty(q.shape)  # dq is summed in fp32
        dq = torch.empty_like(q).copy_(grad)
        wide = [torch.empty_like(q) for _ in range(2)]  # dk and dv for every query head
        groups = q.shape[1] // k.shape[1]
        dk, dv = (one.unflatten(1, (k.shape[1], groups)).sum(2) for one in wide)
        del sums
        return dq, dk, dv


def _sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    assert attn_mask is None and (enable_gqa or q.shape[1] == k.shape[1]), (
        "this pass would not take the flash kernel"
    )
    return _Flash.apply(q, k, v)


def fused_peaks(engine, adapters: FlatAdapters, p: Pass) -> dict[str, int]:
    """Peak bytes of a pass of `fused`.

    What it holds between passes does not count.

    Its kernels are stand-ins that allocate as they do on a GPU.
    """
    from glassloop.engines.fused import engine as whole

    with fused_as_on_a_gpu():
        held = [
            t
            for one in engine.layers
            for linear in one.linears
            for t in (linear.a, linear.b, *vars_of(linear.packed))
        ]
        held += [
            linear.held
            for one in engine.layers
            for linear in one.linears
            if linear.held is not None
        ]
        held += [
            *engine.host.slots,
            *engine.scratch.matrices.values(),
            *(t for pair in engine.scratch.sums.values() for t in pair),
        ]
        live = Live(
            [
                *engine.parameters(),
                *engine.buffers(),
                adapters.flat,
                adapters.grad,
                *vars_of(p),
                *held,
            ]
        )
        found: dict[str, int] = {}
        loss = whole.head_loss

        def marked(*args, **kwargs):
            found["forward"] = live.take_peak()
            return loss(*args, **kwargs)

        with live, patch.object(whole, "head_loss", marked):
            loss_sum, _ = engine(p)
            found["logits"] = live.take_peak()
            loss_sum.backward()
            found["backward"] = live.take_peak()
    adapters.zero_grad()
    return found


@contextmanager
def copies_take_a_layer() -> Iterator[None]:
    """Copies to the host take as long as a layer."""
    from glassloop.engines.fused import host

    copy_out = host.HostRoom.put

    def settle(room, most):
        while len(room.going) > most:
            room.going.popleft()

    def put(room, index, tensors):  # a copy takes as long as a layer
        settle(room, host.IN_FLIGHT - 1)
        copy_out(room, index, tensors)
        room.going.append((tensors, None))

    with patch.multiple(host.HostRoom, put=put, _settle=settle):
        yield


@contextmanager
def fused_as_on_a_gpu() -> Iterator[None]:
    from glassloop.engines.fused import (
        attention,
        attention_groups,
        chunked,
        engine,
        heads,
        layer,
        linear,
        matrices,
    )
    from glassloop.engines.fused.loss import HEAD_CHUNK

    def nothing(*_, **__) -> None:
        pass

    def rotate(x, by, *_, **__) -> None:
        assert len(by.cos) == len(by.sin) == len(x)  # tables are made when they are asked for

    def add_norm(x, y, *_):
        return x if y is None else torch.empty(x.shape, dtype=x.dtype)

    def attend(q, k, v, bounds):
        return attention.Kept(
            torch.empty(q.shape, dtype=q.dtype), (torch.empty(q.shape[1], q.shape[0]),)
        )

    def gradients(grad, q, k, v, kept, bounds):
        sums = torch.empty(q.shape)
        wide = [torch.empty(q.shape, dtype=q.dtype) for _ in range(2)]
        found = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        del sums, wide
        return found

    # torch's flash kernel, which takes the most
    def attend_back(grad, q, k, v, kept, bounds, by, *, room):
        found = gradients(grad, q, k, v, kept, bounds)
        return torch.empty(len(q), sum(t[0].numel() for t in found) + room, dtype=q.dtype)

    def head_loss(hidden, weight, labels, *, wants_grad, **_):
        losses = torch.empty(len(labels))
        room = hidden.new_empty(min(HEAD_CHUNK, len(labels)), len(weight))
        del room
        return losses, hidden

    with (
        copies_take_a_layer(),
        patch.multiple(
            layer,
            add_norm=add_norm,
            norm_backward=nothing,
            swiglu=nothing,
            swiglu_backward=nothing,
        ),
        patch.multiple(
            heads,
            add_norm=add_norm,
            norm_backward=nothing,
            norm_heads=nothing,
            norm_heads_backward=nothing,
            rotate=rotate,
        ),
        patch.multiple(layer, attention=attend, attention_backward=attend_back),
        patch.multiple(chunked, swiglu=nothing, swiglu_backward=nothing),
        patch.multiple(attention_groups, attention=attend, gradients=gradients, rotate=rotate),
        patch.multiple(engine, add_norm=add_norm, norm_backward=nothing, head_loss=head_loss),
        patch.multiple(linear, dequantise=nothing, product_fp32=nothing),
        patch.object(matrices.Moves, "carry_out", nothing),
    ):
        yield
