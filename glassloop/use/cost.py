"""Cost of an answer's tokens: seconds measured, bytes of weights read."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from torch import Tensor, nn

from glassloop.base.checks import dtype_audit

GIB = 2**30
EVERY_S = 30.0  # between two lines of progress where nobody can overwrite them
FIRST_S = 5.0  # before the first one
ADAPTER = ("adapter A", "adapter B")


@dataclass(frozen=True)
class Cost:
    """Cost of one batch of answers.

    A step gives each question of the batch its next token.

    Attributes:
        questions: answered together.
        steps: taken; the longest answer's tokens.
        prompt_s: until the first token of each.
        step_s: of a step after the first; None if there was none.
        step_bytes: of weights that a step reads, wherever they lie. A mixture's experts all count.
        host_bytes: those of them that a GPU reads from the host.
    """

    questions: int
    steps: int
    prompt_s: float
    step_s: float | None
    step_bytes: int
    host_bytes: int

    @property
    def token_s(self) -> float | None:
        """Seconds a token while all questions are being answered."""
        return None if self.step_s is None else self.step_s / self.questions

    def as_dict(self) -> dict[str, int | float | None]:
        """The numbers as plain JSON values."""
        return asdict(self) | {"token_s": self.token_s}

    def words(self) -> str:
        """Describe it for people."""
        said = f"prompt {seconds(self.prompt_s)}"
        if self.step_s is not None and self.token_s is not None:
            said += f", then {seconds(self.token_s)} a token"
            if self.questions > 1:
                said += f" ({seconds(self.step_s)} for one of each of {self.questions} questions)"
        read = f"{self.step_bytes / GIB:.2f} GiB of weights"
        if self.host_bytes:
            read += f", {self.host_bytes / GIB:.2f} of them from the host"
        return f"{said}; {'a step' if self.questions > 1 else 'a token'} reads {read}"


def seconds(value: float) -> str:
    """Seconds in three digits, in ms below one."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def step_bytes(hf: nn.Module, *, with_adapter: bool) -> int:
    """Bytes of weights that one step of an answer reads.

    All but the embedding, of which it reads a row a question, unless that is the head as well.
    """
    groups = dtype_audit(hf)
    tied = all(group.kind != "head" for group in groups)
    left_out = (() if with_adapter else ADAPTER) + (() if tied else ("embedding",))
    return sum(group.size_bytes for group in groups if group.kind not in left_out)


@dataclass
class Meter:
    """A streamer for generate() that times its steps.

    Attributes:
        text: a streamer that gets the same tokens.
        progress: told the steps taken and the seconds of one, after each.
    """

    text: Any = None
    progress: Callable[[int, float | None], None] = lambda _steps, _seconds: None
    clock: Callable[[], float] = time.perf_counter
    steps: int = field(default=0, init=False)
    first: float = field(default=0.0, init=False)
    last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.began, self.prompt_seen = self.clock(), False

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then each step's tokens (B,)."""
        if self.prompt_seen:
            self.steps, self.last = self.steps + 1, self.clock()
            self.first = self.first or self.last
            self.progress(self.steps, self.step_s)
        self.prompt_seen = True
        if self.text is not None:
            self.text.put(value)

    def end(self) -> None:
        if self.text is not None:
            self.text.end()

    @property
    def step_s(self) -> float | None:
        """Seconds of a step after the first; None if there was none."""
        return (self.last - self.first) / (self.steps - 1) if self.steps > 1 else None

    def cost(self, questions: int, step_bytes: int, host_bytes: int) -> Cost:
        prompt_s = self.first - self.began if self.steps else self.clock() - self.began
        return Cost(questions, self.steps, prompt_s, self.step_s, step_bytes, host_bytes)


@dataclass
class Progress:
    """Lines on an answer that takes long.

    They tell the most that is left of it. On a terminal one line is overwritten; elsewhere there is
    one now and then.
    """

    out: TextIO
    most: int
    clock: Callable[[], float] = time.monotonic
    told: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def of(self, what: str) -> Callable[[int, float | None], None]:
        """What a Meter tells while `what` is answered."""

        def tell(steps: int, step_s: float | None) -> None:
            now, terminal = self.clock(), self.out.isatty()
            pause = 0.5 if terminal else EVERY_S
            early = now - self.began < FIRST_S
            if step_s is None or early or (self.told is not None and now - self.told < pause):
                return
            self.told = now
            left = (self.most - steps) * step_s
            line = f"{what}: {steps:,} of at most {self.most:,} tokens, at most {rough(left)} left"
            line += "; Ctrl-C keeps what is there, --max-new-tokens N is shorter"
            print(
                f"\r\033[K{line[:119]}" if terminal else line,
                end="" if terminal else "\n",
                file=self.out,
                flush=True,
            )

        return tell

    def clear(self) -> None:
        """Leave the terminal's line free for what comes."""
        if self.told is not None and self.out.isatty():
            print("\r\033[K", end="", file=self.out, flush=True)


def rough(left_s: float) -> str:
    """Seconds or minutes, for an estimate."""
    return f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min"


@contextmanager
def ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only ask; yields whether it has.

    A second one interrupts. For the main thread.
    """
    asked = False

    def handle(_number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
