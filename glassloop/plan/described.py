"""A decoder described: everything in which families that `fused` supports differ.

families.py makes a description from a model's config; engines/fused computes what it says.

Legend: H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def groups(
    qkv: tuple[str, ...] = QKV, gate_up: tuple[str, ...] = GATE_UP
) -> dict[str, tuple[str, ...]]:
    """Linear layers by the input that they share.

    A joined one stands alone.
    """
    return {
        "qkv": qkv,
        "o": ("self_attn.o_proj",),
        "gate_up": gate_up,
        "down": ("mlp.down_proj",),
    }


@dataclass(frozen=True)
class Kind:
    """Attributes in which layers of one model differ.

    Attributes:
        window: tokens that a token sees, itself included; None: all before it.
        rotary: name of its frequencies; "": the model has one set; None: no positions.
    """

    window: int | None = None
    rotary: str | None = ""


@dataclass(frozen=True)
class Norms:
    """Names of a layer's RMS norms over H; None for none there."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Described:
    """A decoder, in words that all supported families share.

    Biases and a tied head are no part of it: they are read off the modules.

    Attributes:
        heads, key_heads, head_size: of attention.
        eps: of every norm.
        kinds: one a layer.
        norms: where they stand.
        head_norms: norms of q and k before rotation: "" none, "head" one weight for every head,
            "whole" all heads of a token together.
        added_one: a norm multiplies by 1 + weight.
        gate: silu | gelu_tanh.
        rotated: the first elements of a head, which carry positions.
        interleaved: neighbours are turned together, not one half with the other.
        score_scale: factor of q k^T. score_cap: c of c tanh(score / c), before the softmax.
        embedding_scale: factor of embeddings. embedding_rounds: it is rounded to their dtype first.
        residual_scale: factor of what attention and MLP add.
        logit_scale, logit_cap: of the head's product, as scores have them.
        longest: tokens of a row beyond which frequencies or scores would be others; None: no bound.
        groups: group -> names of its linear layers in a decoder layer.
    """

    heads: int
    key_heads: int
    head_size: int
    eps: float
    kinds: tuple[Kind, ...]
    rotated: int
    score_scale: float
    norms: Norms = Norms()
    head_norms: str = ""
    added_one: bool = False
    gate: str = "silu"
    interleaved: bool = False
    score_cap: float | None = None
    embedding_scale: float = 1.0
    embedding_rounds: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    longest: int | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=groups)
