"""The layer and projection of an update that is off.

The first output that is not finite, and norms of adapters, gradients and outputs.

A matrix is compared with itself in a healthy update; without one, with the same projection of the
other layers. Legend: A (R, in) and B (out, R) of an adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from glassloop.data.batches import Window, build_pass
from glassloop.data.rows import Pass, Row
from glassloop.engines.peft import PeftEngine
from glassloop.formula.optim import l2_norm
from glassloop.replay.matrices import MatrixStat, compare, norms, over
from glassloop.replay.replica import Parts
from glassloop.replay.reproduce import Scene, carry_out, enter, fitting_rng
from glassloop.saved.state import restore_rng

OFF = 10.0  # a norm that is this many times what it is compared with names its layer


@dataclass(frozen=True)
class LayerFinding:
    """The layer that is named, and why."""

    kind: str  # "activation" | "gradient" | "weight" | "output"
    name: str  # "layer 1 q_proj", or a module's full name
    layer: int | None
    message: str


@dataclass(frozen=True)
class Output:
    """A module's output in one forward: root mean squares over all places."""

    module: str
    finite: bool
    input_finite: bool
    gain: float | None  # rms of output over rms of input; None if that is not finite or 0
    adapted: bool = False  # a projection with an adapter
    place: int | None = None  # the first place of the pass's first row that is not finite


def inspect_layers(
    scene: Scene, healthy: Scene | None, window: Window, rng_states: Sequence[dict[str, Any]]
) -> tuple[tuple[MatrixStat, ...], LayerFinding | None]:
    """Norms of `window`, and the layer that is off.

    By layer, projection and side.

    Args:
        window: a part of the scene's update.
    """
    healthy_norms = None
    if healthy is not None:
        parts, n = enter(healthy), healthy.supervised_tokens
        carry_out(parts, healthy.rows, healthy.window, n, healthy.state.rng_states)
        healthy_norms = norms(parts)
        healthy_outputs = _outputs(parts, healthy.rows, healthy.window, healthy.state.rng_states[0])
    else:
        healthy_outputs = []
    parts = enter(scene)
    carry_out(parts, scene.rows, window, scene.supervised_tokens, rng_states)
    matrices = compare(norms(parts), healthy_norms)
    outputs = _outputs(parts, scene.rows, window, rng_states[0])
    found = (
        _not_finite(outputs, matrices)
        or _weights_off(matrices, healthy)
        or _outputs_off(outputs, healthy_outputs)
    )
    return matrices, found or _gradients_off(matrices, healthy)


@torch.no_grad()
def _outputs(
    parts: Parts, rows: Sequence[Row], window: Window, rng: dict[str, Any]
) -> list[Output]:
    """Outputs of every leaf module and adapted layer in one forward.

    That of the window's first pass, in the order of execution.
    """
    seen: list[Output] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [
                t
                for t in (output if isinstance(output, tuple) else (output,))
                if isinstance(t, Tensor)
            ]
            given = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
            if not tensors or not tensors[0].is_floating_point():
                return
            finite, input_finite = (
                all(bool(torch.isfinite(t).all()) for t in of) for of in (tensors, given)
            )
            gain = None
            if given and finite and input_finite:
                size = _rms(given[0])
                gain = _rms(tensors[0]) / size if size > 0 else None
            place = None
            if not finite and tensors[0].ndim == 3:
                bad = ~torch.isfinite(tensors[0][0]).all(dim=-1)  # (T,)
                place = int(bad.nonzero()[0]) if bool(bad.any()) else None
            seen.append(Output(name, finite, input_finite, gain, hasattr(module, "lora_A"), place))

        return hook

    handles = [
        module.register_forward_hook(watch(_short(name)))
        for name, module in parts.replica.plain_engine.hf.named_modules()
        if not list(module.children()) or hasattr(module, "lora_A")
    ]
    try:
        restore_rng(next(fitting_rng([rng], parts)), parts.replica.device)
        first = next(one for rank in window.passes for one in rank)
        p = build_pass(
            [rows[number] for number in first],
            packed=window.packed,
            pad_id=parts.replica.pad_id,
            device=parts.replica.device,
        )
        in_modules(parts)(p)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def in_modules(parts: Parts) -> Callable[[Pass], Any]:
    """The forward pass module by module.

    The engine's own, or the reference engine's over the same storage if the engine has no modules.
    """
    if parts.replica.plain_engine.name != "fused":
        return parts.replica.engine
    reference = PeftEngine(parts.replica.plain_engine.hf, parts.replica.plain_engine.report)

    def forward(p: Pass) -> Any:
        with parts.accelerator.autocast():
            return reference(p)

    return forward


def _rms(t: Tensor) -> float:
    return (l2_norm(t.float()) / math.sqrt(max(1, t.numel()))).item()


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("model.")


def _not_finite(outputs: Sequence[Output], matrices: Sequence[MatrixStat]) -> LayerFinding | None:
    """The first output that is not finite.

    If all are: the last layer of those whose gradient is not, since backward comes from the end.
    """
    for before, output in zip([None, *outputs], outputs, strict=False):
        if output.finite:
            continue
        place = f"{output.module} is the first module whose output is not finite"
        if not output.input_finite:
            place = (
                f"{output.module} is the first module with an input that is not finite (after "
                f"{before.module if before else 'none'})"
            )
        if output.place is not None:
            place += f", first at place {output.place}"
        return LayerFinding("activation", output.module, _layer(output.module), place)
    bad = [m for m in matrices if not math.isfinite(m.weight_norm)]
    if bad:
        return LayerFinding(
            "weight", bad[0].name, bad[0].layer, f"the weights of {bad[0].name} are not finite"
        )
    bad = [m for m in matrices if not math.isfinite(m.grad_norm)]
    if bad:
        last = max(bad, key=lambda m: m.layer)
        where = ", ".join(dict.fromkeys(m.projection for m in bad if m.layer == last.layer))
        message = (
            f"every output is finite; gradients are not, from layer {last.layer} ({where}) down"
        )
        return LayerFinding("gradient", f"layer {last.layer}", last.layer, message)
    return None


def _layer(module: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", module)
    return int(found[1]) if found else None


def _weights_off(matrices: Sequence[MatrixStat], healthy: Scene | None) -> LayerFinding | None:
    than = (
        f"in the healthy update {healthy.update}, beyond what most matrices grew by"
        if healthy
        else "in the median of the other layers"
    )
    return _off([(m, m.weight_factor) for m in matrices], "weight", "adapter weights of", than)


def _gradients_off(matrices: Sequence[MatrixStat], healthy: Scene | None) -> LayerFinding | None:
    than = (
        f"in the healthy update {healthy.update}"
        if healthy
        else "in the median of the other layers"
    )
    return _off([(m, m.grad_factor) for m in matrices], "gradient", "gradients of", than)


def _off(
    factors: Sequence[tuple[MatrixStat, float | None]], kind: str, what: str, than: str
) -> LayerFinding | None:
    """The layer of the matrix that is furthest above its reference.

    With all its projections that are off.
    """
    off = [(m, factor) for m, factor in factors if factor is not None and factor >= OFF]
    if not off:
        return None
    worst, factor = max(off, key=lambda item: item[1])
    of_layer = [m for m, _ in off if m.layer == worst.layer]
    all_of_layer = [m for m, _ in factors if m.layer == worst.layer]
    names = ", ".join(f"{m.projection} {m.side}" for m in of_layer[:4])
    names += f" and {len(of_layer) - 4} more" if len(of_layer) > 4 else ""
    names = "all projections" if len(of_layer) == len(all_of_layer) else names
    message = (
        f"{what} layer {worst.layer} ({names}) are up to {factor:,.0f} times what they are {than}"
    )
    name = (
        f"layer {worst.layer} {worst.projection}"
        if len({m.projection for m in of_layer}) == 1
        else f"layer {worst.layer}"
    )
    return LayerFinding(kind, name, worst.layer, message)


def _outputs_off(outputs: Sequence[Output], healthy: Sequence[Output]) -> LayerFinding | None:
    """The first adapted layer whose gain is far too high.

    Above the healthy update's, or the median of the same projection in other layers.
    """
    before = {o.module: o.gain for o in healthy}
    worst: tuple[float, Output] | None = None
    for output in outputs:
        layer, projection = _layer(output.module), output.module.rpartition(".")[2]
        if layer is None or output.gain is None or not output.adapted:
            continue
        others = [
            o.gain
            for o in outputs
            if o.gain
            and o.module.endswith(f".{projection}")
            and _layer(o.module) not in (None, layer)
        ]
        reference = before.get(output.module) or (median(others) if others else 0.0)
        factor = over(output.gain, reference)
        if factor is not None and factor >= OFF and (worst is None or factor > worst[0]):
            worst = factor, output
    if worst is None:
        return None
    than = "in the healthy update" if healthy else "in the median of the other layers"
    message = f"{worst[1].module} enlarges its input {worst[0]:,.0f} times as much as {than}"
    return LayerFinding("output", worst[1].module, _layer(worst[1].module), message)
