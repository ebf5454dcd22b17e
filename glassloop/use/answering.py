"""Answers after training, sampled, by base and adapter, with the reasoning apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from glassloop.loop.generation import EvaluationSetup, generate
from glassloop.use.cost import Cost, Meter, step_bytes
from glassloop.use.sampling import Sampling, processors_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glassloop.use.loaded import Loaded

CLOSE = "</think>"
OPEN = "<think>"


@dataclass(frozen=True)
class Reply:
    """One answer.

    `reasoning` is None without a think block. `closed` is False if the answer ends inside the
    block. `stopped`: it was cut short on request.
    """

    reasoning: str | None
    answer: str
    closed: bool
    ended: bool  # by a stop token
    tokens: int  # stop token included
    stopped: bool = False


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
    progress: Callable[[int, float | None], None] = lambda _steps, _seconds: None,
    cut: Callable[[], bool] = lambda: False,
) -> tuple[list[Reply], Cost]:
    """Answer each prompt once, by the adapter or by the base alone.

    Args:
        seed: question i draws from seed and i; the base and the adapter draw the same noise.
        number: i of the first prompt.
        write: called with ("reasoning" | "answer", text) as the answer grows; needs one prompt.
        progress: told the steps taken and the seconds of one, after each.
        cut: looked at after each token; True ends the answers as they are.

    Raises:
        ValueError: a prompt has more tokens than the model has positions.
    """
    assert write is None or len(prompts) == 1
    check_lengths(loaded, prompts)
    opened = [opens_think(setup.tokenizer, prompt) for prompt in prompts]
    meter = Meter(progress=progress)
    if write is not None:
        meter.text = TextStream(setup.tokenizer, setup.stop_ids, opened[0], write)
    with nullcontext() if with_adapter else loaded.hf.disable_adapter():
        generated = generate(
            loaded.hf,
            prompts,
            setup,
            processors=processors_of(sampling, seed, number),
            streamer=meter,
            cut=cut,
        )
    stopped = cut()
    replies = []
    for ids, inside in zip(generated, opened, strict=True):
        ended = bool(ids) and ids[-1] in setup.stop_ids
        text = decoded(setup.tokenizer, ids[:-1] if ended else ids)
        reasoning, said, closed = split_reasoning(text, inside)
        short = stopped and not ended and len(ids) < setup.max_new_tokens
        replies.append(Reply(reasoning, said, closed, ended, len(ids), short))
    read = step_bytes(loaded.hf, with_adapter=with_adapter)
    return replies, meter.cost(len(prompts), read, loaded.engine.report.host_bytes)
