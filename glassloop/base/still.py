"""A base without random numbers of its own in training.

`lora.dropout` is the only dropout that a config asks for. A base may bring more: modules,
functional dropout by a field of its config, layers that are skipped at random, noise in a router.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NAMES = (
    "drop",
    "jitter",
)  # of rates: attention_dropout, attn_pdrop, layerdrop, router_jitter_noise


def silence(hf: nn.Module) -> str:
    """Set the base's own dropout to 0; returns what was set.

    Rates are found on modules (`p` of a dropout module, numbers named *drop* or *jitter*) and in
    the config, which some models read in every forward pass. Returns a note; empty if all were 0.
    """
    found: dict[str, float] = {}
    for holder, field, name in _rates(hf):
        rate = getattr(holder, field)
        if isinstance(rate, float) and rate > 0:
            found[name] = max(rate, found.get(name, 0.0))
            setattr(holder, field, 0.0)
    if not found:
        return ""
    said = ", ".join(f"{name} {rate:g}" for name, rate in sorted(found.items()))
    return f"the base's own dropout is set to 0 ({said}): lora.dropout is the only one"


def _rates(hf: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """(holder, field, name for people) of whatever may be a rate."""
    for module in hf.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p", "dropout modules"
        fields = [name for name in vars(module) if any(part in name for part in NAMES)]
        yield from ((module, field, field) for field in fields)
    config: Any = hf.config
    for one in (config, config.get_text_config()):
        fields = [name for name in vars(one) if any(part in name for part in NAMES)]
        yield from ((one, field, field) for field in fields)


@torch.no_grad()
def check_still(hf: nn.Module, device: torch.device, model_id: str) -> None:
    """Raise ValueError if training forwards draw random numbers and differ."""
    ids = torch.arange(1, 9, device=device).unsqueeze(0)
    ids = ids % hf.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]  # (1, 8)
    was_training, before = hf.training, _drawn(device)
    hf.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            one = hf(input_ids=ids, use_cache=False).logits
            drew = _drawn(device) != before
            other = hf(input_ids=ids, use_cache=False).logits if drew else one
    finally:
        hf.train(was_training)
    if not torch.equal(one, other):
        raise ValueError(
            f"model.id = {model_id}: {type(hf).__name__} draws random numbers in training mode, "
            "and "
            "glassloop cannot turn them off: set its dropout to 0 in config.json, or choose "
            "another "
            "model"
        )


def _drawn(device: torch.device) -> bytes:
    """The state of the generators that a forward pass may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)
