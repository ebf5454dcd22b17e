"""Three forms of a training example: Example, Row and Pass.

Example: who said what (no tokens). Row: token ids and which of them carry loss. Pass: tensors of
one forward + backward. Legend: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE = -100  # the target of a place that carries no loss; torch's cross_entropy ignores it too


class RowFault(ValueError):
    """A row that cannot train; `kind` names the fault in counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Skip(Exception):
    """A row that teaches nothing; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, or a whole text.

    Attributes:
        role: system | user | assistant | tool; text: a row that is trained whole.
        reasoning: chain of thought of an assistant turn; None without one.
        trained: False for an assistant turn that carries no loss (weight 0, train false).
        inline: The reasoning stood in the content, between think tags, with nothing before it.
        extra: JSON object of the message's tool_calls, name and tool_call_id; None without any.
    """

    role: str
    content: str
    reasoning: str | None = None
    trained: bool = True
    inline: bool = False
    extra: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation before templating.

    Attributes:
        row_id: The row's place in its source ("train:17"), stable under shuffling.
        label: Class of the row ("scam" | "honest"), for balance and verdicts; None without one.
        tools: JSON list of the tools that the conversation may call; None without any.
    """

    row_id: str
    turns: tuple[Turn, ...]
    label: str | None = None
    tools: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A templated, tokenised example.

    `supervised[t]`: token t is a label, predicted from the tokens before it. `supervised[0]` is
    always False: nothing stands before the first token.
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
class Part:
    """One rank's places of a pass that all ranks share.

    Attributes:
        places: of each rank, in the order of the pass.
        idle: none of this rank's is supervised; its place 0 stands in, and counts as 0.
    """

    rank: int
    places: tuple[int, ...]
    idle: bool


@dataclass(frozen=True)
class Pass:
    """Input of one forward + backward on one rank.

    Padded passes are (B, T); packed ones are (1, T) and hold several rows. With a `part` tensors
    and counts are of this rank's places, row_ids and lengths of all.
    """

    row_ids: tuple[str, ...]  # rows of this pass, in order
    input_ids: torch.Tensor  # (B, T) int64
    # (B, T) int64: the token that follows, or IGNORE; the label shift is already done
    targets: torch.Tensor
    # (B, T) int64: place within its row; restarts at each row of a packed pass
    position_ids: torch.Tensor
    # (B, T) int64: index into row_ids; padding belongs to the row that it pads
    row_of: torch.Tensor
    places: torch.Tensor  # (S,) int64: flat indices of the supervised places, counted on the host
    lengths: tuple[int, ...]  # real tokens of each row
    packed: bool
    supervised_tokens: int
    real_tokens: int
    slot_tokens: int
    part: Part | None = None
