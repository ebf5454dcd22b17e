"""NF4 weights of bitsandbytes as 16-bit or fp32 matrices.

Several weights that share an input take one launch. A weight is stored as 4-bit codes, two a byte,
the first in the high half. Every `blocksize` weights share an absmax, itself 8 bits that index a
table of 256 values, times a scale for 256 of them, plus an offset (double quantisation, Dettmers et
al. 2023, arXiv:2305.14314). The result is bit-equal to bitsandbytes.functional.dequantize_4bit:
fp32 products and sums, each rounded once, no fused multiply-add.
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassloop.base.packed import Packed
from glassloop.engines.fused.launch import by_kernels, launch

WEIGHTS_OF_A_PROGRAM = 4096


def pack(modules: list[Any], names: list[str]) -> Packed:
    """Stack the weights of bitsandbytes' Linear4bit modules.

    They keep their values and become views of the result. Raises ValueError naming the module for
    what is not NF4 in rows of whole blocks.
    """
    states: list[Any] = [getattr(module.weight, "quant_state", None) for module in modules]
    for module, state, name in zip(modules, states, names, strict=True):
        if state is None or state.quant_type != "nf4":
            raise ValueError(
                f"execution.engine = fused: {name} is not in NF4: set model.quantization=nf4, or "
                "execution.engine=peft"
            )
        if module.in_features % state.blocksize or module.in_features % 2:
            raise ValueError(
                f"execution.engine = fused: {name} has {module.in_features} inputs, no multiple "
                f"of its {state.blocksize} weights a block: "
                "set execution.engine=peft"
            )
    first, nested = states[0], states[0].nested
    if any(state.nested != nested or state.blocksize != first.blocksize for state in states):
        raise ValueError(
            f"execution.engine = fused: {', '.join(names)} are quantised in different ways: set "
            "execution.engine=peft"
        )
    if nested and any(state.state2.blocksize != 256 for state in states):
        raise ValueError(
            f"execution.engine = fused: {names[0]} has another block of absmax than 256: set "
            "execution.engine=peft"
        )
    none = first.code.new_zeros(0)
    packed = Packed(
        codes=torch.cat([module.weight.data.view(torch.uint8).reshape(-1) for module in modules]),
        absmax=torch.cat([state.absmax.reshape(-1) for state in states]),
        scales=torch.cat([state.state2.absmax.reshape(-1) for state in states]) if nested else none,
        table=first.state2.code if nested else none,
        offsets=torch.stack([state.offset.reshape(()) for state in states]) if nested else none,
        levels=first.code,
        rows=tuple(module.out_features for module in modules),
        columns=modules[0].in_features,
        blocksize=first.blocksize,
    )
    start = 0
    for member, (module, state) in enumerate(zip(modules, states, strict=True)):
        size = module.out_features * module.in_features
        codes = packed.codes[start // 2 : (start + size) // 2]
        module.weight.data = codes.view(module.weight.dtype).view(module.weight.shape)
        blocks = slice(start // packed.blocksize, (start + size) // packed.blocksize)
        state.absmax = packed.absmax[blocks].view(state.absmax.shape)
        if nested:
            before = packed.scales_before(member)
            state.state2.absmax = packed.scales[before : before + state.state2.absmax.numel()].view(
                state.state2.absmax.shape
            )
        start += size
    return packed


def dequantise_reference(packed: Packed, right: Tensor, below: Tensor, out: Tensor) -> None:
    """Write the stacked weights to `out` (N + R, K + R).

    right (N, R) goes to their right and below (R, K) under them, all in its dtype.
    """
    rows, columns = sum(packed.rows), packed.columns
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).reshape(-1)  # (N * K,)
    absmax = packed.absmax
    if packed.nested:
        parts, start = [], 0
        for member, height in enumerate(packed.rows):
            count = height * packed.columns // packed.blocksize
            before = packed.scales_before(member)
            scales = packed.scales[before : before + -(-count // 256)].repeat_interleave(256)[
                :count
            ]
            parts.append(
                packed.table[packed.absmax[start : start + count].long()] * scales
                + packed.offsets[member]
            )
            start += count
        absmax = torch.cat(parts)
    values = packed.levels[codes.long()].view(-1, packed.blocksize) * absmax.unsqueeze(1)
    out[:rows, :columns].copy_(values.view(rows, columns))
    out[:rows, columns:].copy_(right)
    out[rows:, :columns].copy_(below)


def dequantise(packed: Packed, right: Tensor, below: Tensor, out: Tensor) -> None:
    """As `dequantise_reference`; on a GPU in one launch."""
    (dequantise_triton if by_kernels(out) else dequantise_reference)(packed, right, below, out)


def dequantise_triton(packed: Packed, right: Tensor, below: Tensor, out: Tensor) -> None:
    rows, rank = right.shape
    assert out.stride(1) == 1 and right.is_contiguous() and below.is_contiguous()
    starts, befores = packed.starts, packed.befores
    none = packed.levels  # a pointer that is not read
    weights = max(WEIGHTS_OF_A_PROGRAM, packed.blocksize)
    grid = (rows + rank, triton.cdiv(packed.columns, weights))
    launch(
        _dequantise,
        grid,
        packed.codes,
        packed.absmax,
        packed.scales if packed.nested else none,
        packed.table if packed.nested else none,
        packed.offsets if packed.nested else none,
        packed.levels,
        right if rank else out,
        below if rank else out,
        out,
        out.stride(0),
        rows,
        packed.columns,
        rank,
        starts[1],
        starts[2],
        befores[1],
        befores[2],
        BLOCKSIZE=packed.blocksize,
        NESTED=packed.nested,
        WEIGHTS=weights,
        RANK=triton.next_power_of_2(max(rank, 1)),
        num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds the product and the sum, each
    )


# Where these two lie differs by layer, and what is gathered needs no alignment: one kernel for all.
@triton.jit(do_not_specialize_on_alignment=["scales", "offsets"])
def _dequantise(
    codes,
    absmax,
    scales,
    table,
    offsets,
    levels,
    right,
    below,
    out,
    stride,
    rows,
    columns,
    rank,
    second,
    third,
    before_second,
    before_third,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RANK: tl.constexpr,
):
    row = tl.program_id(0)
    BLOCKS: tl.constexpr = WEIGHTS // BLOCKSIZE
    if row >= rows:  # under the weights
        column = tl.program_id(1) * WEIGHTS + tl.arange(0, WEIGHTS)
        value = tl.load(
            below + (row - rows).to(tl.int64) * columns + column, mask=column < columns, other=0.0
        )
        tl.store(out + row.to(tl.int64) * stride + column, value, mask=column < columns)
        return
    if tl.program_id(1) == 0:  # to their right
        beside = tl.arange(0, RANK)
        value = tl.load(right + row.to(tl.int64) * rank + beside, mask=beside < rank, other=0.0)
        tl.store(out + row.to(tl.int64) * stride + columns + beside, value, mask=beside < rank)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # within the row
    blocks_of_a_row = columns // BLOCKSIZE
    there = block < blocks_of_a_row
    size = tl.load(
        absmax + row.to(tl.int64) * blocks_of_a_row + block, mask=there, other=0
    )  # once a block, not once a byte
    if NESTED:
        member = (row >= second).to(tl.int32) + (row >= third).to(tl.int32)
        start = tl.where(member == 2, third, tl.where(member == 1, second, 0))
        before = tl.where(member == 2, before_third, tl.where(member == 1, before_second, 0))
        scale = tl.load(
            scales + before + ((row - start) * blocks_of_a_row + block) // 256,
            mask=there,
            other=0.0,
        )
        size = tl.load(table + size.to(tl.int32), mask=there, other=0.0) * scale + tl.load(
            offsets + member
        )
    byte = (
        block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    )  # (BLOCKS, BLOCKSIZE / 2), within the row
    code = tl.load(codes + row.to(tl.int64) * (columns // 2) + byte, mask=there[:, None], other=0)
    high = tl.load(levels + (code >> 4).to(tl.int32)) * size[:, None]
    low = tl.load(levels + (code & 15).to(tl.int32)) * size[:, None]
    weight = tl.interleave(high, low).to(out.dtype.element_ty)  # (BLOCKS, BLOCKSIZE)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out + row.to(tl.int64) * stride + place, weight, mask=there[:, None])
