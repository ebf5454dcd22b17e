"""One pass through a model for its logits and its decoder's output.

A base that streams is read from the host in every pass.

Legend: B rows, T places, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GIVEN = ("input_ids", "use_cache")  # what a decoder is given here, by keyword


@torch.no_grad()
def logits_and_hidden(hf: nn.Module, decoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of ids, and what `decoder(ids)` returns.

    ids: (B, T). Returns (B, T, V) and (B, T, H). The decoder's output is taken on the way. If the
    model gives its decoder anything but the ids, such as scaled embeddings or a mask, the decoder
    runs again on the ids alone.
    """
    seen: list[Tensor | None] = []

    def look(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        first = given.get("input_ids", args[0] if args else None)
        more = [name for name, value in given.items() if name not in GIVEN and value is not None]
        plain = first is ids and len(args) <= 1 and not more
        seen.append(output.last_hidden_state if plain else None)

    handle = decoder.register_forward_hook(look, with_kwargs=True)
    try:
        logits = hf(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) == 1 and seen[0] is not None:
        return logits, seen[0]
    return logits, decoder(input_ids=ids, use_cache=False).last_hidden_state
