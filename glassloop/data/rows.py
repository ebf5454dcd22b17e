"""The three forms a training example takes on its way to the model.

Example: who said what (no tokens). Row: token ids and which of them carry loss. Pass: tensors of one forward + backward.
Legend: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE = -100  # the target of a place that carries no loss; torch's cross_entropy ignores it too


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. `reasoning` is the chain of thought of an assistant turn, None where there is none."""

    role: str  # "system" | "user" | "assistant"
    content: str
    reasoning: str | None = None


@dataclass(frozen=True)
class Example:
    """A conversation before templating. `row_id` is the row's place in its source ("train:17"), stable under shuffling."""

    row_id: str
    turns: tuple[Turn, ...]
    label: str | None = (
        None  # class of the row, for balance and verdicts ("scam" | "honest"); None where there is none
    )


@dataclass(frozen=True)
class Row:
    """A templated, tokenised example. `supervised[t]` says that token t is a label, predicted from the tokens before it.

    `supervised[0]` is always False: nothing stands before the first token.
    """

    row_id: str
    input_ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        return sum(self.supervised)


@dataclass(frozen=True)
class Pass:
    """What one rank computes in one forward + backward. Padded passes are (B, T); packed ones (1, T) with several rows."""

    row_ids: tuple[str, ...]  # rows of this pass, in order
    input_ids: torch.Tensor  # (B, T) int64
    targets: (
        torch.Tensor
    )  # (B, T) int64: the token that follows, or IGNORE; the label shift is already done
    position_ids: (
        torch.Tensor
    )  # (B, T) int64: place within its row; restarts at each row of a packed pass
    row_of: (
        torch.Tensor
    )  # (B, T) int64: index into row_ids; padding belongs to the row that it pads
    places: torch.Tensor  # (S,) int64: flat indices of the supervised places, counted on the host
    lengths: tuple[int, ...]  # real tokens of each row
    packed: bool
    supervised_tokens: int
    real_tokens: int
    slot_tokens: int
