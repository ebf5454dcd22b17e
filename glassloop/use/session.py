"""A session of `glassloop generate`: streamed answers, batches, or a chat."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glassloop.data.rows import Example, Turn
from glassloop.data.scam import SCAM_QUESTION
from glassloop.data.templates import Template
from glassloop.record.printable import printable
from glassloop.use import answering
from glassloop.use.answering import Reply, check_lengths
from glassloop.use.cost import Cost, Progress, ctrl_c_asks
from glassloop.use.loaded import Loaded, setup_of
from glassloop.use.questions import typed
from glassloop.use.sampling import Sampling, sampling_of, stop_ids_of
from glassloop.use.trained import Trained

SIDES = {"both": ("base", "adapter"), "base": ("base",), "adapter": ("adapter",)}


SCHEMA = 1  # of a line of --json
WIDE = 100  # columns from which answers stand beside each other


class Session:
    """State that all questions share."""

    def __init__(
        self,
        given: argparse.Namespace,
        trained: Trained,
        tokenizer: Any,
        template: Template,
        loaded: Loaded,
    ) -> None:
        self.given, self.template, self.loaded = given, template, loaded
        settings = loaded.hf.get_base_model().generation_config
        own, notes = sampling_of(settings)
        self.sampling = chosen(own, given)
        setup = setup_of(
            loaded,
            template,
            tokenizer,
            batch_size=given.batch,
            max_new_tokens=given.max_new_tokens,
        )
        self.setup = dataclasses.replace(setup, stop_ids=stop_ids_of(template, settings))
        self.system = trained.config.data.system
        if given.system is not None:
            self.system = typed(given.system, "--system") or None
        self.console: Console = Console(soft_wrap=True, highlight=False)
        self.sides = SIDES[given.only]
        self.cut: Callable[[], bool] = lambda: False  # whether a stop was asked
        self.whole = 0  # questions that were answered whole
        if not given.json:
            self.say(
                f"adapter   {trained.checkpoint}, {trained.why}; {self.sampling.words()}, seed "
                f"{given.seed}"
            )
            slow = (
                [
                    f"at most {given.max_new_tokens:,} tokens an answer; on a CPU that may take "
                    "minutes: --max-new-tokens N is shorter, Ctrl-C keeps what is there"
                ]
                if loaded.device.type == "cpu"
                else []
            )
            for note in (*trained.notes, *loaded.notes, *notes, *slow):
                self.say(f"          {note}")

    def say(self, text: str = "", style: str = "", end: str = "\n") -> None:
        self.console.print(
            harmless(text, self.console.encoding), markup=False, style=style, end=end
        )

    def run(self, questions: list[str]) -> int:
        if self.given.chat:
            self.chat()
            return 0
        prompts = [self.prompt(self.first_turns(question)) for question in questions]
        check_lengths(self.loaded, prompts)  # all of them before the first answer
        with ctrl_c_asks() as self.cut:
            if len(questions) == 1 and not self.given.json:
                self.say()
                self.stream(prompts[0])
            else:
                self.batches(questions, prompts)
            if not self.cut():
                return 0
        whole = f"{self.whole:,} of {len(questions):,} questions were answered whole"
        print(f"\nstopped by Ctrl-C: {whole}", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it

    def batches(self, questions: Sequence[str], prompts: Sequence[list[int]]) -> None:
        """Answer several questions together; a stop shows what there is."""
        for start in range(0, len(prompts), self.given.batch):
            batch = list(prompts[start : start + self.given.batch])
            replies: dict[str, list[Reply]] = {}
            costs: dict[str, Cost] = {}
            for side in self.sides:
                if not self.cut():
                    replies[side], costs[side] = self.answers(batch, side, start)
            for place in range(len(batch)):
                mine = {side: found[place] for side, found in replies.items()}
                self.show(start + place, questions[start + place], mine, costs)
                self.count(mine)
            for side, cost in {} if self.given.json else costs.items():
                self.say(f"{side:<9} {cost.words()}", "dim")
            if self.cut():
                return

    def count(self, replies: dict[str, Reply]) -> None:
        """Count a question that every side has answered whole."""
        all_sides = len(replies) == len(self.sides)
        self.whole += all_sides and not any(reply.stopped for reply in replies.values())

    def first_turns(self, question: str) -> list[Turn]:
        text = SCAM_QUESTION + question.strip() if self.given.call else question
        return [
            *([Turn("system", self.system)] if self.system is not None else []),
            Turn("user", text),
        ]

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        return self.template.prompt_ids(Example("question", tuple(turns)))

    def answers(
        self, prompts: list[list[int]], side: str, first: int, write: Any = None
    ) -> tuple[list[Reply], Cost]:
        """Answer prompts together; progress goes to stderr, unless the text shows it."""
        progress = Progress(sys.stderr, self.given.max_new_tokens)
        shown = write is not None and self.console.is_terminal
        what = f"{side}, {len(prompts)} questions" if len(prompts) > 1 else side
        found = answering.answer(
            self.loaded,
            prompts,
            self.setup,
            with_adapter=side == "adapter",
            sampling=self.sampling,
            seed=self.given.seed,
            number=first,
            write=write,
            progress=(lambda _steps, _seconds: None) if shown else progress.of(what),
            cut=self.cut,
        )
        progress.clear()
        return found

    def stream(
        self, prompt: list[int], sides: Sequence[str] = (), turn: int = 0
    ) -> dict[str, Reply]:
        """Stream both answers, one after the other.

        Reasoning is dim and has its own heading.
        """
        replies: dict[str, Reply] = {}
        for side in sides or self.sides:
            if self.cut():
                break
            self.say(f"--- {side}", "bold")
            shown: list[str] = []

            def write(kind: str, text: str, shown: list[str] = shown) -> None:
                if kind not in shown:
                    if shown:
                        self.say()
                    shown.append(kind)
                    self.say(f"[{kind}]", "dim")
                self.say(text, "dim italic" if kind == "reasoning" else "", end="")
                self.console.file.flush()

            (replies[side],), cost = self.answers([prompt], side, turn, write)
            self.say()
            self.say(ending(replies[side], self.given.max_new_tokens), "dim")
            self.say(cost.words(), "dim")
        self.count(replies)
        return replies

    def show(
        self, number: int, question: str, replies: dict[str, Reply], costs: dict[str, Cost]
    ) -> None:
        if self.given.json:
            told = {
                side: dataclasses.asdict(reply) | {"cost": costs[side].as_dict()}
                for side, reply in replies.items()
            }
            line = {"schema": SCHEMA, "number": number, "question": question, **told}
            utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
            print(json.dumps(line, ensure_ascii=not utf8), flush=True)
            return
        self.say()
        self.say(
            f"=== {number + 1}: {question if len(question) <= 300 else question[:300] + ' ...'}",
            "bold",
        )
        if self.console.is_terminal and self.console.width >= WIDE and len(replies) == 2:
            self.console.print(beside(replies, self.console, self.given.max_new_tokens))
            return
        for side, reply in replies.items():
            self.say(f"--- {side} ({ending(reply, self.given.max_new_tokens)})", "bold")
            if reply.reasoning is not None:
                self.say("[reasoning]", "dim")
                self.say(reply.reasoning, "dim italic")
                self.say("[answer]", "dim")
            self.say(reply.answer)

    def chat(self) -> None:
        """Each side has its own conversation, since its answers are other ones."""

        self.say(
            "Say something; /reset begins anew, /exit ends. Each side continues with its own "
            "answers (--only adapter for one)."
        )
        talks: dict[str, list[Turn]] = {side: [] for side in self.sides}
        turn = 0
        while True:
            try:
                said = typed(input("you> "), "what you typed").strip()
            except (EOFError, KeyboardInterrupt):
                self.say()
                return
            if said == "/exit":
                return
            if said == "/reset":
                talks = {side: [] for side in self.sides}
                continue
            if not said:
                continue
            said_now: dict[str, list[Turn]] = {}
            try:
                for side, turns in talks.items():
                    asked = [*turns, Turn("user", said)] if turns else self.first_turns(said)
                    prompt = self.prompt(asked)
                    check_lengths(self.loaded, [prompt])
                    reply = self.stream(prompt, (side,), turn)[side]
                    reasoning = (
                        reply.reasoning
                        if reply.reasoning is not None or not self.template.opens_think
                        else ""
                    )
                    said_now[side] = [*asked, Turn("assistant", reply.answer, reasoning)]
            except KeyboardInterrupt:
                self.say("\nstopped: your last words and what was answered are forgotten")
                continue
            except (
                ValueError
            ) as error:  # the template takes one question only, or the talk has grown too long
                self.say(f"refused: {error}; /reset begins anew")
                continue
            talks = said_now
            turn += 1


def chosen(own: Sampling, given: argparse.Namespace) -> Sampling:
    """The model's own sampling with what was given in place.

    Raises ValueError for values that mean nothing.
    """
    if given.greedy and any(
        value is not None for value in (given.temperature, given.top_p, given.top_k)
    ):
        raise ValueError(
            "--greedy takes the most likely token: leave --temperature, --top-p and --top-k out"
        )
    if given.greedy:
        return dataclasses.replace(own, temperature=0.0)
    fields = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(given, name)) is not None
    }
    if fields and "temperature" not in fields and not own.temperature:
        fields["temperature"] = 1.0
    return dataclasses.replace(own, **fields)


def harmless(text: str, encoding: str) -> str:
    """Escape a model's text for a terminal; keep line breaks."""

    return printable(text, encoding, keep="\n")


def ending(reply: Reply, most: int) -> str:
    """Describe how an answer ended."""
    if reply.ended:
        return f"{reply.tokens:,} tokens, ended by itself"
    inside = "" if reply.closed else ", inside its reasoning"
    if reply.stopped:
        return f"stopped at {reply.tokens:,} of at most {most:,} tokens{inside}"
    full = ": the model has no more positions" if reply.tokens < most else ""
    return f"cut off at {reply.tokens:,} of at most {most:,} tokens{inside}{full}"


def beside(replies: dict[str, Reply], console: Console, most: int) -> Any:
    """Two answers in two columns."""

    table = Table(expand=True)
    cells = []
    for side, reply in replies.items():
        table.add_column(f"{side} ({ending(reply, most)})", ratio=1, overflow="fold")
        cell = Text()
        if reply.reasoning is not None:
            cell.append("[reasoning]\n", style="dim")
            cell.append(harmless(reply.reasoning, console.encoding) + "\n", style="dim italic")
            cell.append("[answer]\n", style="dim")
        cells.append(cell.append(harmless(reply.answer, console.encoding)))
    table.add_row(*cells)
    return table
