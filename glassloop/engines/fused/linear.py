"""Frozen weights that share an input, with their adapters folded in.

y = x (W + s B A)^T is one matrix product. The factors lie side by side, so that the adapters' share
needs no pass over the activations of its own:

    forward    y  = [x | x (sA)^T] [W | B]^T          (T, K + R) by (N, K + R)
    backward   dx = [dy | dy B] [W ; sA]              (T, N + R) by (N + R, K)
               dA += s (dy B)^T x,  dB += dy^T (x (sA)^T)

A bias c is one more column of B, met by a column of ones in x: [x | x (sA)^T | 1] [W | B | c]^T.
Its row of sA is 0, so nothing of it comes back.

[W | B] and [W ; sA] are two views of one scratch matrix (N + R, K + R), filled anew for each layer.
W is the weights of all members one below the other, A likewise, B is block-diagonal. The adapters'
gradients are added to the parameters' own fp32 `.grad`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glassloop.base.packed import Packed
from glassloop.engines.fused.dequant import dequantise
from glassloop.engines.fused.matrices import Move

# Elements. Sizes and strides that are no multiple of it send matrix products to slower kernels.
ALIGNMENT = 16


@dataclass(frozen=True)
class Adapter:
    """PEFT's matrices beside one weight.

    They are read through `a` and `b` at each pass, so replacing their data is safe.
    """

    a: nn.Parameter  # (r, K) fp32
    b: nn.Parameter  # (N, r) fp32
    scaling: float  # alpha / r


class Linear:
    """A group of weights and adapters.

    Attributes:
        group: its name in a layer: qkv, o, gate_up or down. No layer has two of one name.
        rows, columns: N and K.
        adapted: columns of all adapters together; a bias has the next one.
        rank: R, these columns rounded up to ALIGNMENT; 0 where no member has an adapter or a bias.
    """

    def __init__(
        self,
        group: str,
        packed: Packed,
        adapters: tuple[Adapter | None, ...],
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ):
        """`bias`: (N,), of all members, 0 for one that has none."""
        self.group = group
        self.packed, self.adapters, self.bias = packed, adapters, bias
        self.rows, self.columns = sum(packed.rows), packed.columns
        self.adapted = sum(adapter.a.shape[0] for adapter in adapters if adapter is not None)
        self.rank = -(-(self.adapted + (bias is not None)) // ALIGNMENT) * ALIGNMENT
        device = packed.codes.device
        self.a = torch.zeros(self.rank, self.columns, dtype=dtype, device=device)  # s A, rounded
        self.b = torch.zeros(
            self.rows, self.rank, dtype=dtype, device=device
        )  # B, rounded, block-diagonal, and the bias
        if bias is not None:
            self.b[:, self.adapted].copy_(bias)
        # (N + R, K + R): W, B and s A in one matrix of this group's own. a and b are its parts.
        self.held: Tensor | None = None

    def hold(self) -> None:
        """Keep the weights in 16 bits from here on."""
        if self.held is None:
            held = self.a.new_empty(self.rows + self.rank, self.columns + self.rank)
            dequantise(self.packed, self.b, self.a, held)
            self.held, self.a, self.b = (
                held,
                held[self.rows :, : self.columns],
                held[: self.rows, self.columns :],
            )

    def release(self) -> None:
        """Dequantise at each use again."""
        if self.held is not None:
            self.held, self.a, self.b = None, self.a.contiguous(), self.b.contiguous()

    def places(self) -> list[tuple[Adapter, slice, slice]]:
        """Each adapter with its rows of W and columns.

        The columns are the fold's.
        """
        found, row, column = [], 0, 0
        for adapter, rows in zip(self.adapters, self.packed.rows, strict=True):
            if adapter is not None:
                r = adapter.a.shape[0]
                found.append((adapter, slice(row, row + rows), slice(column, column + r)))
                column += r
            row += rows
        return found

    def inward(self) -> list[Move]:
        """The adapters as they are now, to their rounded form."""
        found = []
        for adapter, rows, columns in self.places():
            found.append(Move(adapter.a.data, self.a[columns], adapter.scaling))
            found.append(Move(adapter.b.data, self.b[rows, columns]))
        return found

    def outward(self, scratch: Scratch) -> list[Move]:
        """Moves of the scratch's dA and dB to the adapters' gradients."""
        grad_a, grad_b = scratch.products(self)
        found = []
        for adapter, rows, columns in self.places():
            assert adapter.a.grad is not None and adapter.b.grad is not None, (
                "the adapters have no gradient to add to"
            )
            found.append(Move(grad_a[columns], adapter.a.grad, adapter.scaling))
            found.append(Move(grad_b[rows, columns], adapter.b.grad))
        return found

    def input(self, tokens: int) -> Tensor:
        """(T, K + R), to be filled in its first K columns."""
        return self.a.new_empty(tokens, self.columns + self.rank)

    def output(self, tokens: int) -> Tensor:
        """(T, N + R): an output, or its gradient.

        It has room for the adapters' columns.
        """
        return self.a.new_empty(tokens, self.rows + self.rank)

    def narrow(self, x: Tensor) -> Tensor:
        """(T, R): a copy of the last columns of x, x (sA)^T.

        `forward` left them there.
        """
        return x[:, self.columns :].clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """y (T, N), in `out` if there is one.

        x: (T, K + R). Its last R columns are written here; `accumulate` needs them.
        """
        torch.mm(x[:, : self.columns], self.a.t(), out=x[:, self.columns :])
        if self.bias is not None:
            x[:, self.columns + self.adapted].fill_(1)
        factor = weights[: self.rows].t()  # (K + R, N)
        return torch.mm(x, factor) if out is None else torch.mm(x, factor, out=out)

    def fold(self, grad: Tensor) -> None:
        """Write dy B into the last R columns of grad.

        grad: (T, N + R), whose first N are dy. The two methods below need it.
        """
        torch.mm(grad[:, : self.rows], self.b, out=grad[:, self.rows :])

    def accumulate(
        self, grad: Tensor, x: Tensor, narrow: Tensor, scratch: Scratch, *, add: bool = False
    ) -> None:
        """Leave dA and dB in the scratch, or `add` them there.

        grad: (T, N + R), folded. x: (T, K). narrow: (T, R), as `forward` left it.
        """
        if self.rank:
            grad_a, grad_b = scratch.products(self)
            product_fp32(grad[:, self.rows :].t(), x, grad_a, add=add)
            product_fp32(grad[:, : self.rows].t(), narrow, grad_b, add=add)

    def input_gradient(self, grad: Tensor, weights: Tensor) -> Tensor:
        """(T, K). grad: (T, N + R), folded."""
        return torch.mm(grad, weights[:, : self.columns])


def product_fp32(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """left @ right to `out`, accumulated in fp32; or added to it."""
    if add:
        one = torch.empty_like(out)
        product_fp32(left, right, one)
        out.add_(one)
        return
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


class Scratch:
    """Matrices that the layers of a pass use in turn.

    Each belongs to a group of a layer, not to a shape: two groups of one layer may have the same
    shape, and both are needed at once. Ranks may differ between layers; a group's room is that of
    its largest layer.
    """

    def __init__(self) -> None:
        self.matrices: dict[str, Tensor] = {}
        self.sums: dict[tuple[str, int, int, int], tuple[Tensor, Tensor]] = {}
        self.held: dict[str, Linear] = {}

    def weights(self, linear: Linear) -> Tensor:
        """W with B at its right and sA below.

        (N + R, K + R). Dequantises them unless the matrix holds this group's already, or the group
        its own.
        """
        if linear.held is not None:
            return linear.held
        group = linear.group
        shape = linear.rows + linear.rank, linear.columns + linear.rank
        size = shape[0] * shape[1]
        if group not in self.matrices or self.matrices[group].numel() < size:
            self.matrices[group] = linear.a.new_empty(size)
            self.held.pop(group, None)
        matrix = self.matrices[group][:size].view(shape)
        if self.held.get(group) is not linear:
            dequantise(linear.packed, linear.b, linear.a, matrix)
            self.held[group] = linear
        return matrix

    def holds_of(self, linear: Linear) -> bool:
        """True if this group's weights need no dequantising."""
        return linear.held is not None or self.held.get(linear.group) is linear

    def products(self, linear: Linear) -> tuple[Tensor, Tensor]:
        """Room for a group's dA and dB, fp32.

        (R, K) and (N, R); they hold until the next layer's.
        """
        key = (linear.group, linear.rank, linear.rows, linear.columns)
        if key not in self.sums:
            a, b = (x.new_empty(x.shape, dtype=torch.float32) for x in (linear.a, linear.b))
            self.sums[key] = a, b
        return self.sums[key]

    @property
    def bytes(self) -> int:
        """Of the weights' matrices that have been asked for so far."""
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def forget(self) -> None:
        """Adapters have changed: nothing that is held is right any more."""
        self.held.clear()
