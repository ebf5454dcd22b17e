"""Bytes of a layer of `fused` over chunks of places.

Counted from engines/fused/chunked.py. Legend: see tiers.py; S supervised places, C places of a
chunk, A columns of attention's output.
"""

from __future__ import annotations

from glassloop.predict.tiers import Host, Sizes

CHUNKS = (8192, 4096, 2048)  # places, from the quickest to the smallest
GROUPS = 8  # of heads, at most, whose gradient attention takes at a time


def forward_bytes(
    one: Sizes, tokens: int, chunk: int, host: Host, places: int, ranks: int = 1
) -> int:
    """Most of a layer's forward, beside what all layers have left.

    It is the last layer, or the one before it, for which the last one's share is free yet. `ranks`
    share the pass; tokens and places are one's.
    """
    a, hidden = one.element, one.qkv.columns
    # The input, what came in (its middle may be on its way to the host), attention's output.
    whole = hidden * ((host != "nothing") + (host != "all")) + one.o.columns
    lse = 0 if host in ("attention", "all") else 4 * one.heads
    queries = one.qkv.rows + one.qkv.rank + one.turned
    always = tokens * (a * whole + lse)
    # A group's q, k, v, its output, and that on its way to other ranks.
    group = one.qkv.rows + one.o.columns * (1 + (ranks > 1)) + _shared_keys(one, ranks)
    return always + max(
        a * tokens * queries + int(a * tokens * group * _share(one, ranks)),
        a * 2 * places * hidden + _forward_chunk(one, min(chunk, places)),
    )


def before_last_bytes(
    one: Sizes, tokens: int, chunk: int, host: Host, stays: int, ranks: int = 1
) -> int:
    """Most of the forward of the layer before the last one."""
    return forward_bytes(one, tokens, chunk, host, tokens, ranks) - stays


def backward_bytes(one: Sizes, tokens: int, chunk: int, host: Host, ranks: int = 1) -> int:
    """Most of a layer's backward, beside its share and the gradient."""
    a = one.element
    again = host in ("nothing", "inputs")  # attention is computed again
    queries = a * (one.qkv.rows + one.qkv.rank + one.turned)
    attended = (a * one.o.columns + 4 * one.heads) if again else 0
    slope = a * one.o.columns
    mlp = tokens * (attended + slope + again * queries) + _backward_chunk(one, chunk, host)
    # A group's: dq in fp32, dk and dv for each query head, copies of five tensors, the gradients.
    group = (4 + 4 * a) * one.o.columns + 2 * a * one.qkv.rows
    into = a * (one.qkv.rows + one.qkv.rank)
    # What is on its way to other ranks, and key heads that several of them take.
    group += a * (2 * one.o.columns * (ranks > 1) + 2 * _shared_keys(one, ranks))
    part = int(tokens * group * _share(one, ranks))
    attention = tokens * (attended + slope + queries + into) + part
    return max(mlp, attention)


def exchange_bytes(one: Sizes, tokens: int, ranks: int) -> int:
    """Most bytes that sharing a pass adds to a layer's backward.

    Without chunks: all places of some heads, in copies of five tensors, and what is on its way. 0
    for a rank alone.
    """
    if ranks == 1:
        return 0
    columns = one.qkv.rows + 4 * one.o.columns + 2 * _shared_keys(one, ranks)
    return one.element * tokens * columns


def _key_heads(one: Sizes) -> int:
    return (one.qkv.rows - one.o.columns) // 2 * one.heads // one.o.columns


def _shared_keys(one: Sizes, ranks: int) -> int:
    """Columns of k and v that ranks hold twice.

    Several ranks take one key head where there are fewer than ranks.
    """
    own = one.qkv.rows - one.o.columns
    return max(0, own * ranks // _key_heads(one) - own)


def _share(one: Sizes, ranks: int) -> float:
    """Share of a rank's heads in a group of whole key heads."""
    own = max(1, -(-_key_heads(one) // ranks))
    return -(-own // GROUPS) / own


def _forward_chunk(one: Sizes, chunk: int) -> int:
    """Attention's output, the middle and its norm, gate and up, their product."""
    columns = one.o.columns + one.o.rank + 2 * one.qkv.columns + one.gate_up.rank
    columns += one.qkv.columns * one.after_o
    return one.element * chunk * (columns + one.gate_up.rows + one.down.columns + one.down.rank)


def _backward_chunk(one: Sizes, chunk: int, host: Host) -> int:
    """The same computed again, and its gradients."""
    columns = one.qkv.columns + one.gate_up.rank
    if host != "all":
        columns += one.o.columns + one.o.rank + one.qkv.columns
    columns += one.qkv.columns * (one.after_o + one.after_down)
    columns += one.gate_up.rows + one.gate_up.rank + one.down.columns
    return one.element * chunk * columns
