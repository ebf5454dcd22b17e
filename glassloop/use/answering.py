"""Answers after training, sampled, by base and adapter, with the reasoning apart.

Sampling follows the model's generation settings. It takes the most likely token of log p + Gumbel
noise, which is a draw from p (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). Each question
has its own noise generator, seeded by the seed and the question's number. So an answer is the same
alone and in a batch, on any device, and no random number of the process is drawn.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassloop.loop.generation import EvaluationSetup, generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glassloop.data.templates import Template
    from glassloop.use.loaded import Loaded

CLOSE = "</think>"
OPEN = "<think>"
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


@dataclass(frozen=True)
class Reply:
    """One answer.

    `reasoning` is None without a think block. `closed` is False if the answer ends inside the
    block.
    """

    reasoning: str | None
    answer: str
    closed: bool
    ended: bool  # by a stop token
    tokens: int  # stop token included


def split_reasoning(text: str, opened: bool) -> tuple[str | None, str, bool]:
    """Split an answer into (reasoning, answer, whether the block was closed).

    `opened`: the prompt ends in an open think block.
    """
    if not opened:
        if not text.lstrip().startswith(OPEN):
            return None, text.strip(), True
        text = text.lstrip().removeprefix(OPEN)
    reasoning, closed, answer = text.partition(CLOSE)
    return reasoning.strip(), answer.strip(), bool(closed)


class Splitter:
    """Streamed text -> ("reasoning" | "answer", text) pieces, without the tags.

    A tag may arrive in parts.
    """

    def __init__(self, opened: bool) -> None:
        self.inside, self.decided, self.held, self.begun = opened, opened, "", False

    def feed(self, text: str, last: bool = False) -> list[tuple[str, str]]:
        """Return the pieces that are certain by now; `last` returns the rest."""
        self.held += text
        pieces: list[tuple[str, str]] = []
        if not self.decided:
            start = self.held.lstrip()
            if not last and OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                return []
            self.decided, self.inside = True, start.startswith(OPEN)
            self.held = start.removeprefix(OPEN) if self.inside else self.held
        if self.inside and CLOSE in self.held:
            reasoning, _, self.held = self.held.partition(CLOSE)
            self._add(pieces, "reasoning", reasoning.rstrip())
            self.inside, self.begun = False, False
        if self.inside and not last:
            keep = next(
                (n for n in range(len(CLOSE) - 1, 0, -1) if self.held.endswith(CLOSE[:n])), 0
            )
            out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        else:
            out, self.held = self.held, ""
        self._add(pieces, "reasoning" if self.inside else "answer", out)
        return pieces

    def _add(self, pieces: list[tuple[str, str]], kind: str, text: str) -> None:
        if not self.begun:
            text = text.lstrip()
        if text:
            self.begun = True
            pieces.append((kind, text))


class TextStream:
    """Streamer for generate() with one prompt.

    It calls `write(kind, text)` with whole characters as they come.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        opened: bool,
        write: Callable[[str, str], None],
    ):
        self.tokenizer, self.stop_ids, self.write = tokenizer, set(stop_ids), write
        self.splitter, self.ids, self.shown, self.prompt_seen, self.stopped = (
            Splitter(opened),
            [],
            "",
            False,
            False,
        )

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # transformers gives the prompt first
            self.prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.stopped = self.stopped or token in self.stop_ids
            if not self.stopped:
                self.ids.append(token)
        text = decoded(self.tokenizer, self.ids)
        if not text.endswith("\ufffd"):  # the bytes of one character may come in several tokens
            self._tell(text, False)

    def end(self) -> None:
        self._tell(decoded(self.tokenizer, self.ids), True)

    def _tell(self, text: str, last: bool) -> None:
        new, self.shown = text[len(self.shown) :], text
        for kind, piece in self.splitter.feed(new, last):
            self.write(kind, piece)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text with every special token visible."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def opens_think(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> bool:
    """Tell if a prompt ends in an open think block.

    A model's own chat template may open one too.
    """
    return decoded(tokenizer, prompt[-8:]).rstrip().endswith(OPEN)


def check_lengths(loaded: Loaded, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for a question that leaves no position for an answer."""
    positions = getattr(loaded.hf.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        if positions is not None and len(prompt) >= positions:
            which = f"question {number}" if len(prompts) > 1 else "the question"
            raise ValueError(
                f"{which} has {len(prompt):,} tokens with its template, the model has "
                f"{positions:,} positions: shorten it"
            )


def answer(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    setup: EvaluationSetup,
    *,
    with_adapter: bool,
    sampling: Sampling,
    seed: int,
    number: int = 0,
    write: Callable[[str, str], None] | None = None,
) -> list[Reply]:
    """Answer each prompt once, by the adapter or by the base alone.

    Args:
        seed: question i draws from seed and i; the base and the adapter draw the same noise.
        number: i of the first prompt.
        write: called with ("reasoning" | "answer", text) as the answer grows; needs one prompt.

    Raises:
        ValueError: a prompt has more tokens than the model has positions.
    """
    assert write is None or len(prompts) == 1
    check_lengths(loaded, prompts)
    opened = [opens_think(setup.tokenizer, prompt) for prompt in prompts]
    streamer = None
    if write is not None:
        streamer = TextStream(setup.tokenizer, setup.stop_ids, opened[0], write)
    with nullcontext() if with_adapter else loaded.hf.disable_adapter():
        generated = generate(
            loaded.hf,
            prompts,
            setup,
            processors=processors_of(sampling, seed, number),
            streamer=streamer,
        )
    replies = []
    for ids, inside in zip(generated, opened, strict=True):
        ended = bool(ids) and ids[-1] in setup.stop_ids
        text = decoded(setup.tokenizer, ids[:-1] if ended else ids)
        reasoning, said, closed = split_reasoning(text, inside)
        replies.append(Reply(reasoning, said, closed, ended, len(ids)))
    return replies
