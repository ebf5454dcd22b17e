"""The cost of a merge on held-out rows: loss, next tokens.

The next token is compared with that of the adapter on the run's own base. Every model computes in
the precision of the run (--precision), so that the table compares weights, not arithmetic.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassloop.base.reading import prepare_4bit
from glassloop.data.rows import IGNORE, Row
from glassloop.data.templates import targets

PLACES = 1024  # supervised places whose logits are in memory at a time


@dataclass(frozen=True)
class Seen:
    """A model's results at the supervised places of some rows."""

    loss_nats: float  # token mean
    next_tokens: Tensor  # (S,) int64 on the CPU: the most likely token at each place


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    loss_nats: float
    agreement: float  # share of places with the adapter's own next token
    rows: int
    tokens: int


@torch.no_grad()
def look(
    model: Any,
    rows: Sequence[Row],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Seen:
    """Measure a model row by row, without padding.

    `model`: a causal LM of transformers, with or without adapters.
    """
    losses, best = [], []
    for row in rows:
        wanted = torch.tensor(targets(row), device=device)  # (T,)
        places = (wanted != IGNORE).nonzero().squeeze(1)
        if not len(places):
            continue
        ids = torch.tensor([row.input_ids], device=device)
        with autocast():
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[
                0, places
            ]  # (S, H)
        head = model.get_output_embeddings()
        for start in range(0, len(places), PLACES):
            part = slice(start, start + PLACES)
            with autocast():
                logits = head(hidden[part]).float()  # (S, V)
            losses.append(
                torch.nn.functional.cross_entropy(logits, wanted[places[part]], reduction="none")
                .double()
                .cpu()
            )
            best.append(logits.argmax(-1).cpu())
    if not losses:
        raise ValueError(
            "no row has a supervised token, so there is nothing to compare: choose other rows "
            "(--data), or --no-table"
        )
    return Seen(float(torch.cat(losses).mean()), torch.cat(best))


def look_at_folder(
    folder: Path,
    rows: Sequence[Row],
    device: torch.device,
    dtype: torch.dtype,
    trust_code: bool = False,
) -> Seen:
    """Measure a saved model, loaded as anybody would load it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, trust_remote_code=trust_code
    ).eval()
    prepare_4bit(model, dtype)
    seen = look(model, rows, device, nullcontext)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seen


def line(name: str, seen: Seen, reference: Seen, rows: int) -> Line:
    agreement = float((seen.next_tokens == reference.next_tokens).double().mean())
    return Line(name, seen.loss_nats, agreement, rows, len(reference.next_tokens))


def text(lines: Sequence[Line], reference: str) -> list[str]:
    """Write the table for people."""
    if not lines:
        return []
    size = f"on {lines[0].rows} held-out rows, {lines[0].tokens:,} tokens"
    head = f"{size:<44}{'loss, nats':>11}   next token as {reference}"
    return [head, *(f"{one.name:<44}{one.loss_nats:>11.4f}{one.agreement:>16.2%}" for one in lines)]
