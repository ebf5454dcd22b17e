"""Sampling of answers: the model's own settings, reproducible draws.

It takes the most likely token of log p + Gumbel noise, which is a draw from p (Gumbel 1954;
Maddison et al. 2014, arXiv:1411.0030). Each question has its own noise generator, seeded by the
seed and the question's number. So an answer is the same alone and in a batch, on any device, and no
random number of the process is drawn.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from glassloop.data.templates import Template

NOT_APPLIED = (
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "num_beams",
    "penalty_alpha",
)
NEUTRAL = {"typical_p": 1.0, "num_beams": 1}


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token.

    Temperature 0 takes the most likely one; then only the penalty has an effect.
    """

    temperature: float = 0.0
    top_p: float | None = (
        None  # keep the fewest most likely tokens that together have this probability
    )
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("top_p", 0, 1), ("min_p", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise ValueError(f"{name} = {value}: it must lie above {low} and not above {high}")
        if not 0 <= self.temperature <= 100:
            raise ValueError(
                f"temperature = {self.temperature}: it must lie between 0 (the most likely token) "
                "and 100"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: it must be 1 or more")

    def words(self) -> str:
        """Describe it for people."""
        if not self.temperature:
            return "greedy"
        rest = [
            f"{name} {value:g}"
            for name in ("top_p", "top_k", "min_p")
            if (value := getattr(self, name)) is not None
        ]
        return ", ".join([f"temperature {self.temperature:g}", *rest])


def sampling_of(settings: Any) -> tuple[Sampling, list[str]]:
    """Read a model's generation settings; also returns notes on those not applied.

    transformers adds a top_k of 50 if the settings have none; glassloop does not.
    """
    given = settings.to_dict() if settings is not None else {}
    odd = [
        f"{name} = {given[name]}"
        for name in NOT_APPLIED
        if given.get(name) not in (None, 0, NEUTRAL.get(name))
    ]
    notes = (
        [f"generation_config.json asks for {', '.join(odd)}, which is not applied here"]
        if odd
        else []
    )
    penalty = given.get("repetition_penalty")
    sampling = Sampling(repetition_penalty=None if penalty in (None, 1.0) else float(penalty))
    if given.get("do_sample"):
        temperature = given.get("temperature")
        sampling = replace(
            sampling,
            temperature=1.0 if temperature is None else float(temperature),
            top_p=given.get("top_p"),
            top_k=given.get("top_k") or None,
            min_p=given.get("min_p"),
        )
    return sampling, notes


def stop_ids_of(template: Template, settings: Any) -> tuple[int, ...]:
    """The template's end tokens, and those of the model's generation settings."""
    own = getattr(settings, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return tuple(dict.fromkeys((*template.stop_ids, *own)))


class GumbelNoise:
    """Logits processor that makes the likeliest token a draw; comes last."""

    def __init__(self, seed: int, first: int, count: int) -> None:
        self.generators = [
            torch.Generator().manual_seed((seed * 1_000_003 + first + row) % 2**63)
            for row in range(count)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # scores (B, V)
        uniform = torch.stack(
            [
                torch.rand(scores.shape[-1], generator=one, dtype=torch.float64)
                for one in self.generators
            ]
        )
        noise = -torch.log(
            -torch.log(uniform.clamp(min=1e-300))
        )  # (B, V), float64: fp32's steps near 1 would cut off the tail
        return torch.log_softmax(scores.double(), -1) + noise.to(scores.device)


def processors_of(
    sampling: Sampling, seed: int, number: int = 0
) -> Callable[[int, int], list[Any]]:
    """Build generate()'s processors: all that changes logits before the choice.

    `number` is that of the first prompt.
    """
    from transformers.generation import logits_process as hf

    shared: list[Any] = []
    if sampling.repetition_penalty is not None:
        shared.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        if sampling.temperature != 1:
            shared.append(hf.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k is not None:
            shared.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1:
            shared.append(hf.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            shared.append(hf.MinPLogitsWarper(sampling.min_p))
    return lambda first, count: [
        *shared,
        *([GumbelNoise(seed, number + first, count)] if sampling.temperature else []),
    ]
