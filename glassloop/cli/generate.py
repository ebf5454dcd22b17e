"""Answer questions with the base and the adapter side by side: streamed, in batches, or in a chat."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from glassloop.data.rows import Turn
    from glassloop.data.templates import Template
    from glassloop.use.answering import Reply, Sampling
    from glassloop.use.loaded import Loaded
    from glassloop.use.trained import Trained

SIDES = {"both": ("base", "adapter"), "base": ("base",), "adapter": ("adapter",)}
WIDE = 100  # columns from which answers stand beside each other


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What all commands that open a trained adapter take."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run, or of one of its checkpoints"
    )
    parser.add_argument(
        "--at",
        type=int,
        metavar="N",
        help="the checkpoint after N updates (default: the best by held-out loss)",
    )
    parser.add_argument("--model", metavar="MODEL", help="where the base model is now (model.id)")
    parser.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run Python code that comes with the model; a run's config cannot ask for it",
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder for quantised bases (model.cache_dir)"
    )


def overrides_of(given: argparse.Namespace) -> dict[str, str]:
    """Fields of the recorded config that the command line replaces."""
    asked = {
        "model.id": given.model,
        "model.trust_remote_code": given.trust_remote_code,
        "model.cache_dir": given.cache_dir,
    }
    return {field: str(value) for field, value in asked.items() if value is not None}


def main(argv: list[str]) -> int:
    """`glassloop generate RUN ["question" ...] [--file FILE] [--chat]`.

    Exit code 0; 2 for what is refused.
    """
    own = argparse.ArgumentParser(
        prog="glassloop generate",
        allow_abbrev=False,
        description="Answers by the base and by the adapter. Sampling is what the model's generation_config.json asks for, unless given.",
    )
    add_run_options(own)
    own.add_argument(
        "question",
        nargs="*",
        help="one question each; - reads stdin, and so does no question at all",
    )
    own.add_argument(
        "--file",
        type=Path,
        help="questions, one a line (.jsonl: strings, or objects with question, prompt or dialogue)",
    )
    own.add_argument(
        "--chat",
        action="store_true",
        help="talk in turns; /reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer",
    )
    own.add_argument(
        "--call",
        action="store_true",
        help="the text is a phone call: ask about it what format scam asks",
    )
    own.add_argument("--only", choices=SIDES, default="both", help="whose answers (default: both)")
    own.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt (default: the run's data.system; '' for none)",
    )
    own.add_argument("--greedy", action="store_true", help="the most likely token at each place")
    own.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="logits are divided by T before a token is drawn; 0: as --greedy",
    )
    own.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest most likely tokens that have P together",
    )
    own.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    own.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="question i draws from seed and i (default: 0)",
    )
    own.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="longest answer, reasoning included (default: 1024)",
    )
    own.add_argument(
        "--batch", type=int, default=8, metavar="N", help="questions answered together (default: 8)"
    )
    own.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="instead of the run's own"
    )
    own.add_argument("--json", action="store_true", help="one JSON object a question")
    given = own.parse_intermixed_args(
        argv
    )  # options may stand before the question, between and after
    for name in ("batch", "max_new_tokens"):
        if getattr(given, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(given, name)}: it must be 1 or more"
            )
    return run(given)


def run(given: argparse.Namespace) -> int:
    from glassloop.use.questions import questions_of

    if given.chat and (given.question or given.file or given.json):
        raise ValueError(
            "--chat reads questions as you type them: leave the question, --file and --json out"
        )
    questions: list[str] = []
    if not given.chat:
        wants_stdin = "-" in given.question or not (given.question or given.file)
        stdin = sys.stdin.buffer.read() if wants_stdin and not sys.stdin.isatty() else None
        questions = questions_of(given.question, given.file, stdin)

    from glassloop.loop.launch import hush
    from glassloop.use.loaded import device_here, load
    from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

    hush(1)
    trained = open_trained(given.run, given.at, overrides_of(given))
    tokenizer = load_tokenizer_of(trained)
    template = template_of(trained, tokenizer)
    loaded = load(trained, device_here(), precision=given.precision)
    return Session(given, trained, tokenizer, template, loaded).run(questions)


class Session:
    """What stays the same from question to question."""

    def __init__(
        self,
        given: argparse.Namespace,
        trained: Trained,
        tokenizer: Any,
        template: Template,
        loaded: Loaded,
    ) -> None:
        from rich.console import Console

        from glassloop.use.answering import sampling_of, stop_ids_of
        from glassloop.use.loaded import setup_of
        from glassloop.use.questions import typed

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
        if not given.json:
            self.say(
                f"adapter   {trained.checkpoint}, {trained.why}; {self.sampling.words()}, seed "
                f"{given.seed}"
            )
            for note in (*trained.notes, *loaded.notes, *notes):
                self.say(f"          {note}")

    def say(self, text: str = "", style: str = "", end: str = "\n") -> None:
        self.console.print(
            harmless(text, self.console.encoding), markup=False, style=style, end=end
        )

    def run(self, questions: list[str]) -> int:
        from glassloop.use.answering import check_lengths

        if self.given.chat:
            self.chat()
            return 0
        prompts = [self.prompt(self.first_turns(question)) for question in questions]
        check_lengths(self.loaded, prompts)  # all of them before the first answer
        if len(questions) == 1 and not self.given.json:
            self.say()
            self.stream(prompts[0])
            return 0
        for start in range(0, len(prompts), self.given.batch):
            batch = prompts[start : start + self.given.batch]
            replies = {side: self.answers(batch, side, start) for side in self.sides}
            for place in range(len(batch)):
                self.show(
                    start + place,
                    questions[start + place],
                    {side: replies[side][place] for side in self.sides},
                )
        return 0

    def first_turns(self, question: str) -> list[Turn]:
        from glassloop.data.rows import Turn
        from glassloop.data.scam import SCAM_QUESTION

        text = SCAM_QUESTION + question.strip() if self.given.call else question
        return [
            *([Turn("system", self.system)] if self.system is not None else []),
            Turn("user", text),
        ]

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        from glassloop.data.rows import Example

        return self.template.prompt_ids(Example("question", tuple(turns)))

    def answers(
        self, prompts: list[list[int]], side: str, first: int, write: Any = None
    ) -> list[Reply]:
        from glassloop.use.answering import answer

        return answer(
            self.loaded,
            prompts,
            self.setup,
            with_adapter=side == "adapter",
            sampling=self.sampling,
            seed=self.given.seed,
            number=first,
            write=write,
        )

    def stream(
        self, prompt: list[int], sides: Sequence[str] = (), turn: int = 0
    ) -> dict[str, Reply]:
        """Both answers as they are written, one after the other; reasoning dim and under its own heading."""
        replies = {}
        for side in sides or self.sides:
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

            (replies[side],) = self.answers([prompt], side, turn, write)
            self.say()
            self.say(ending(replies[side], self.given.max_new_tokens), "dim")
        return replies

    def show(self, number: int, question: str, replies: dict[str, Reply]) -> None:
        if self.given.json:
            told = {side: dataclasses.asdict(reply) for side, reply in replies.items()}
            line = {"number": number, "question": question, **told}
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
        from glassloop.data.rows import Turn
        from glassloop.use.answering import check_lengths
        from glassloop.use.questions import typed

        self.say(
            "Say something; /reset begins anew, /exit ends. Each side goes on with its own answers "
            "(--only adapter for one)."
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
    """What a model wrote, its line breaks kept and whatever else a terminal would obey made visible."""
    from glassloop.record.printable import printable

    return printable(text, encoding, keep="\n")


def ending(reply: Reply, most: int) -> str:
    """How an answer came to its end."""
    if reply.ended:
        return f"{reply.tokens:,} tokens, ended by itself"
    inside = "" if reply.closed else ", inside its reasoning"
    full = ": the model has no more positions" if reply.tokens < most else ""
    return f"cut off at {reply.tokens:,} of at most {most:,} tokens{inside}{full}"


def beside(replies: dict[str, Reply], console: Console, most: int) -> Any:
    """Two answers in two columns."""
    from rich.table import Table
    from rich.text import Text

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
