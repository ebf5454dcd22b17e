"""The fused attention's programs and kernels against plain torch."""

from __future__ import annotations

import importlib.util
import math
from itertools import accumulate, pairwise

import pytest
import torch
from kernel_cases import CUTS, interpreted, off, wide_heads

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


def test_attention_programs_cover_every_token_once_and_the_longest_walks_come_first():
    from glassloop.engines.fused.attention_work import Tile, Tiles, programs

    lengths = (1, 5, 16, 17, 40)
    starts = [0, 1, 6, 22, 39]
    forward, queries, keys = programs(
        lengths, Tiles(Tile(16, 8, 4, 2), Tile(8, 16, 4, 2), Tile(16, 16, 4, 2))
    )
    for flat, own, to_the_end in ((forward, 16, False), (queries, 8, False), (keys, 16, True)):
        entries = list(zip(*[iter(flat)] * 4, strict=True))
        walks = [length - first if to_the_end else first for _, length, first, _ in entries]
        assert walks == sorted(walks, reverse=True)
        found = [
            start + at
            for start, length, first, _ in entries
            for at in range(first, min(first + own, length))
        ]
        assert sorted(found) == list(range(sum(lengths)))
        assert all(length == lengths[starts.index(start)] for start, length, _, _ in entries)


@interpreted
@pytest.mark.parametrize(("dtype", "mark"), [(torch.float32, 3e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads"),
    [
        ((1, 5, 17, 40), 2, 1),
        pytest.param((32, 16, 33), 6, 2, marks=pytest.mark.thorough),
        ((31, 48), 2, 2),
    ],
)
def test_attention_and_its_gradient_before_rotation(dtype, mark, cuts, lengths, heads, key_heads):
    """Every row by itself, whatever its length leaves of a block.

    Nothing is written beside the columns that are its own. The interpreter has no product in bf16.
    """
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused import attention_triton
    from glassloop.engines.fused.attention_work import Tile, Tiles

    size, tokens = 16, sum(lengths)
    tiles = Tiles(*(Tile(own, step, 4, 2, split) for own, step, split in cuts))
    bounds = a.Bounds.for_kernel("triton", lengths, torch.device("cpu"), tiles)
    plain = a.Bounds.for_kernel("reference", lengths, torch.device("cpu"))
    grad, q, k, v, by = wide_heads(tokens, heads, key_heads, size, dtype)
    kept = a.attention(q, k, v, bounds)
    into = torch.full((tokens, (heads + 2 * key_heads) * size + 16), 7.0, dtype=dtype)
    attention_triton.backward(grad, q, k, v, kept.out, kept.rest[0], by, bounds.work, into[:, :-16])

    exact = [t.double() for t in (grad, q, k, v)]
    out = a.attention(*exact[1:], plain)
    truth = a.attention_backward(*exact, out, plain, by)
    scores = (
        torch.einsum("qhd,khd->hqk", exact[1], exact[2].repeat_interleave(heads // key_heads, 1))
        * size**-0.5
    )
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (row[:, None] == row[None, :]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert torch.allclose(
        kept.rest[0].double() * math.log(2),
        scores.masked_fill(~seen, -math.inf).logsumexp(2),
        atol=1e-4,
    )
    assert kept.out.is_contiguous() and off(kept.out, out.out) < mark
    for start, end in pairwise(
        [0, *accumulate(lengths)]
    ):  # a row of one token has no gradient in q and k, so with another
        assert off(into[start:end, :-16], truth[start:end]) < mark
    queries, keys = heads * size, key_heads * size
    for part in (slice(0, queries), slice(queries, queries + keys), slice(queries + keys, -16)):
        assert (
            off(into[:, part], truth[:, part] if part.stop > 0 else truth[:, part.start :]) < mark
        )
    assert bool((into[:, -16:] == 7).all())


@interpreted
def test_offsets_of_64_bits_change_no_bit(monkeypatch):
    """They serve tensors of 2^31 elements and more, which no CPU test can have."""
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused import attention_triton
    from glassloop.engines.fused.attention_work import Tile, Tiles

    lengths, heads, key_heads, size = (1, 5, 20), 2, 1, 16
    tiles = Tiles(*(Tile(own, step, 4, 2, True) for own, step in ((16, 8), (8, 16), (16, 16))))
    bounds = a.Bounds.for_kernel("triton", lengths, torch.device("cpu"), tiles)
    grad, q, k, v, by = wide_heads(sum(lengths), heads, key_heads, size, torch.float32)
    found, seen = [], []
    options = attention_triton._options

    def watched(*given):
        seen.append(options(*given)["WIDE"])
        return options(*given)

    monkeypatch.setattr(attention_triton, "_options", watched)
    for widest in (1 << 31, 1):
        monkeypatch.setattr(attention_triton, "WIDEST", widest)
        kept = a.attention(q, k, v, bounds)
        found.append((kept.out, *kept.rest, a.attention_backward(grad, q, k, v, kept, bounds, by)))
    assert seen == [False] * 3 + [True] * 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@interpreted
def test_a_row_without_finite_values_leaves_its_neighbours_alone():
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import Tile, Tiles

    lengths, tile = (20, 9, 20), Tile(16, 16, 4, 2)
    bounds = a.Bounds.for_kernel("triton", lengths, torch.device("cpu"), Tiles(tile, tile, tile))
    grad, q, k, v, by = wide_heads(sum(lengths), 2, 1, 16, torch.float32)
    for t in (grad, q, k, v):
        t[20:29] = torch.nan
    kept = a.attention(q, k, v, bounds)
    into = a.attention_backward(grad, q, k, v, kept, bounds, by)
    for t in (kept.out.flatten(1), into):
        assert t[20:29].isnan().all() and t[:20].isfinite().all() and t[29:].isfinite().all()


@interpreted
@pytest.mark.parametrize("most", [1, 2])
def test_groups_of_heads_through_this_packages_kernels_have_the_gradient_of_all(monkeypatch, most):
    """As ranks that share a pass compute it: turned back after the exchange, not in the kernel."""
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused import exchange
    from glassloop.engines.fused.attention_groups import backward_by_groups, forward_by_groups
    from glassloop.engines.fused.attention_work import Tile, Tiles

    monkeypatch.setattr(exchange, "all_to_all", lambda received, sent, *_: received.copy_(sent))
    lengths, tile = (1, 5, 17), Tile(16, 16, 4, 2)
    bounds = a.Bounds.for_kernel("triton", lengths, torch.device("cpu"), Tiles(tile, tile, tile))
    grad, q, k, v, by = wide_heads(sum(lengths), 4, 2, 16, torch.float32)
    whole = a.attention(q, k, v, bounds)
    truth = a.attention_backward(grad, q, k, v, whole, bounds, by, room=3)
    alone = exchange.Exchange(0, (sum(lengths),))
    kept = forward_by_groups(q, k, v, bounds, alone, most)
    assert torch.equal(kept.out, whole.out) and len(kept.rest) == most
    found = backward_by_groups(
        grad, q, k, v, kept, bounds, by, room=3, chunk=7, exchange=alone, most=most
    )
    assert off(found[:, :-3], truth[:, :-3]) < 1e-6
