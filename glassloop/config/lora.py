"""LoRA's settings: layers, ranks, scales, and what trains beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from glassloop.config.sections import Section

ALL_LINEAR = "all-linear"  # as lora.targets: every linear layer but the head
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_RANK = 1024
# A pattern may come from a stranger's config.yaml and is matched with every layer's name: one
# without groups and with two quantifiers cannot take long.
PATTERN = re.compile(r"(?:\\[.d][*+]?|[\w.\]][*+]?|[\-\[^$])+")
QUANTIFIERS = 2


class LoraConfig(Section):
    r: int = Field(default=16, ge=1, le=MOST_RANK)
    """Rank of the update: W + (alpha/r) B A, A is (r, in), B is (out, r)."""
    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale alpha/r."""
    rslora: bool = False
    """Scale by alpha/sqrt(r) in place of alpha/r (rsLoRA, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an input of A is zeroed in training."""
    targets: tuple[str, ...] = PROJECTIONS
    """Linear layers that get an adapter, by the last part of their name. all-linear: every one but
    the head."""
    rank_pattern: tuple[str, ...] = ()
    """Layers of another rank than r, as NAME=RANK: q_proj=8. NAME ends the layer's name, or is a
    pattern of it: layers.[01].self_attn.q_proj=8. The first that matches counts. Also
    lora.rank_pattern.NAME=RANK, and a mapping in YAML."""
    alpha_pattern: tuple[str, ...] = ()
    """Layers of another alpha, as rank_pattern has ranks: q_proj=32."""
    target_parameters: tuple[str, ...] = ()
    """Parameters that get an adapter, by the end of their name: experts that lie in one tensor a
    layer (mlp.experts.gate_up_proj,mlp.experts.down_proj). A tensor's B A is one for every
    expert."""
    trainable_token_indices: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids of tokens whose embedding is trained whole, such as new ones. A head that is the
    embedding trains with it."""

    @property
    def scale(self) -> float:
        """Factor of B A beside W, where no pattern names another."""
        return self._scaled(self.r, self.alpha)

    @property
    def scale_in_words(self) -> str:
        """The factor as it is computed."""
        return f"{self.alpha:g}/{f'sqrt({self.r})' if self.rslora else self.r}"

    @property
    def exceptions(self) -> tuple[str, ...]:
        """Lines on layers of another rank, and on tokens that train."""
        other = [f"r = {r} in {name}" for name, r in self.ranks.items()]
        other += [f"alpha = {alpha:g} in {name}" for name, alpha in self.alphas.items()]
        count = len(self.trainable_token_indices)
        tokens = [f"the embedding of {count} token{'s' * (count > 1)}"] if count else []
        tokens += list(self.target_parameters)
        return (*(["but " + ", ".join(other)] if other else []), *(f"and {t}" for t in tokens))

    @property
    def ranks(self) -> dict[str, int]:
        """Patterns of layers' names -> their rank."""
        return {name: int(value) for name, value in _values("rank", self.rank_pattern).items()}

    @property
    def alphas(self) -> dict[str, float]:
        """Patterns of layers' names -> their alpha."""
        return _values("alpha", self.alpha_pattern)

    @property
    def most_rank(self) -> int:
        """The largest rank that a layer may have."""
        return max((self.r, *self.ranks.values()))

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its whole name."""
        return int(_first(self.ranks, layer, self.r))

    def scale_of(self, layer: str) -> float:
        """Factor of B A beside a layer's W, by its whole name."""
        return self._scaled(self.rank_of(layer), _first(self.alphas, layer, self.alpha))

    def _scaled(self, r: int, alpha: float) -> float:
        return alpha / (math.sqrt(r) if self.rslora else r)

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        """YAML brings a mapping."""
        if not isinstance(value, Mapping):
            return value
        return tuple(f"{name}={one}" for name, one in value.items())

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            raise ValueError(
                f"lora.targets = {', '.join(self.targets)}: {ALL_LINEAR} already has every layer; "
                "name it alone"
            )
        for name, r in _values("rank", self.rank_pattern).items():
            if not r.is_integer() or not 1 <= r <= MOST_RANK:
                raise ValueError(
                    f"lora.rank_pattern.{name} = {r:g}: give a whole number from 1 to {MOST_RANK}"
                )
        for name, alpha in self.alphas.items():
            if not 0 < alpha < math.inf:
                raise ValueError(f"lora.alpha_pattern.{name} = {alpha:g}: give a number above 0")
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"lora.dropout = {self.dropout:g} and lora.target_parameters: PEFT has no dropout "
                "there; set it to 0"
            )
        ids = self.trainable_token_indices
        if twice := sorted({one for one in ids if ids.count(one) > 1}):
            raise ValueError(f"lora.trainable_token_indices has {twice[0]} twice: name it once")
        return self


def _values(kind: str, words: Sequence[str]) -> dict[str, float]:
    """Numbers by pattern.

    Raises ValueError for a word that is no NAME=NUMBER, or a name that is twice there or no
    pattern to be matched safely.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        field = f"lora.{kind}_pattern = {word}"
        if not name or name in found:
            raise ValueError(f"{field}: write NAME={kind.upper()}, once a name")
        try:
            found[name] = float(text)
            re.compile(name)
        except ValueError as error:
            raise ValueError(f"{field}: {text!r} is no number: write NAME=8") from error
        except re.error as error:
            raise ValueError(f"{field}: {name} is no pattern ({error})") from error
        if not PATTERN.fullmatch(name) or len(re.findall(r"[*+]", name)) > QUANTIFIERS:
            raise ValueError(
                f"{field}: a name may have letters, digits, . _ - [ ] ^ $ \\. \\d, and at most "
                f"{QUANTIFIERS} of * and + behind a character; a name more is an entry more"
            )
    return found


def matches(pattern: str, layer: str) -> bool:
    """Match the end of a layer's name, as PEFT does."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def _first(values: Mapping[str, float], layer: str, otherwise: float) -> float:
    """The value of the first pattern that matches."""
    for name, value in values.items():
        if matches(name, layer):
            return value
    return otherwise
