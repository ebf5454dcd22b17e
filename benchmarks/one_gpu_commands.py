"""Commands of one_gpu.py's parts: their words, started one after the other, timed. No torch."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import two_gpus_runs as runs
from suite import Verdict, failed, judged
from two_gpus_runs import Place


@dataclass(frozen=True)
class Here:
    """Where the parts run, and on what.

    Attributes:
        model: in place of every part's own; "" for none.
        source: words of a config that name the rows.
        real_rows: whether they are the user's.
        updates: of the long run.
        layers: of the 70B shapes where fewer than all do; 0: all.
        variables: of the environment, for every command.
    """

    place: Place
    model: str
    source: tuple[str, ...]
    real_rows: bool
    updates: int = 60
    layers: int = 12
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def on_card(self) -> bool:
        return self.place.device == "cuda"

    @property
    def work(self) -> Path:
        return self.place.work

    def of(self, name: str, layers: int = 0) -> str:
        """model.id of drawn weights, with so many layers; 0: all."""
        return self.model or f"random:{name}" + (f":{layers}" if layers else "")

    def pick(self, on_card: Any, on_cpu: Any) -> Any:
        """A size for a card, or one that a CPU can do."""
        return on_card if self.on_card else on_cpu


@dataclass(frozen=True)
class Command:
    """One command of a part.

    Attributes:
        name: of its log and, for a run, of its folder.
        words: as a shell gets them.
        kill_at: SIGKILL when so many updates are recorded and a checkpoint is saved; 0: never.
        run: folder of the run that it writes, if its first update is to be timed.
        may_fail: the part's other commands are started even so.
    """

    name: str
    words: tuple[str, ...]
    kill_at: int = 0
    run: Path | None = None
    may_fail: bool = False
    variables: tuple[tuple[str, str], ...] = ()

    def line(self, here: Here) -> str:
        """The command for a shell."""
        given = {**here.variables, **dict(self.variables)}
        before = [f"{name}={shlex.quote(value)}" for name, value in sorted(given.items())]
        text = " ".join([*before, shlex.join(self.words)])
        return text + (f"  # SIGKILL after update {self.kill_at}" if self.kill_at else "")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    code: None if its time was over. first_update_s: from launch to the first line of metrics.jsonl.
    said: the end of what it printed.
    """

    code: int | None
    seconds: float
    first_update_s: float | None
    said: str


@dataclass(frozen=True)
class Part:
    """One thing that a card is to show.

    commands: what is run, in order. judge: the verdict, once all have ended well.
    """

    limit_s: float
    mark: str
    commands: Callable[[Here], list[Command]]
    judge: Callable[[Here, dict[str, Ended]], Verdict]
    needs_card: bool = False


def run_part(here: Here, part: Part, until: float) -> Verdict:
    """Run a part's commands and judge them."""
    if part.needs_card and not here.on_card:
        return Verdict("left out", "it needs a card", {})
    ended: dict[str, Ended] = {}
    for command in part.commands(here):
        if time.monotonic() >= until - 1:
            return failed(f"{command.name}: no time was left", **told(ended))
        one = ended[command.name] = run_command(here, command, until)
        if one.code is None:
            return failed(f"{command.name}: its time was over", said=one.said, **told(ended))
        if one.code != (-9 if command.kill_at else 0) and not command.may_fail:
            return failed(f"{command.name}: exit code {one.code}", said=one.said, **told(ended))
    verdict = part.judge(here, ended)
    return Verdict(verdict.verdict, verdict.why, {**verdict.numbers, **told(ended)})


def told(ended: dict[str, Ended]) -> dict[str, Any]:
    """What the JSON keeps of commands."""
    return {
        "commands": {
            name: {"code": one.code, "seconds": round(one.seconds, 1)}
            for name, one in ended.items()
        }
    }


def run_command(here: Here, command: Command, until: float) -> Ended:
    """Run one command until it ends, is to be killed, or its time is over."""
    place, folder = here.place, command.run
    given = {**here.variables, **dict(command.variables)}
    one = runs.start(place, command.words, command.name, 1, given)
    first: float | None = None
    while one.process.poll() is None and time.monotonic() < until:
        done = _lines(folder)
        if done and first is None:
            first = time.monotonic() - one.began
        if folder and command.kill_at and done >= command.kill_at and runs.checkpoint_names(folder):
            runs.kill(runs.tree(one.process.pid))
        time.sleep(0.02)
    code = one.process.poll()
    seconds = time.monotonic() - one.began
    if first is None and _lines(folder):
        first = seconds
    runs.end(one)
    return Ended(code, seconds, first, one.said)


def _lines(folder: Path | None) -> int:
    """Updates that a run has recorded; 0 where there is no run to look at."""
    if folder is None:
        return 0
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def marked(here: Here, held: bool, why: str, **numbers: Any) -> Verdict:
    """A verdict on a speed or a size, which only a card can miss."""
    if not here.on_card:
        return Verdict("held", f"{why}; no card, so no mark", numbers)
    return judged(held, why, **numbers)


def lines_in(path: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a benchmark's file of one kind."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line.get("kind") == kind]


def script(here: Here, name: str, *words: str) -> tuple[str, ...]:
    """`python benchmarks/NAME WORDS`."""
    return (here.place.python, f"benchmarks/{name}", *words)


def training(
    here: Here,
    name: str,
    model: str,
    *words: str,
    preset: str = "r1_8b_scam",
    before: Sequence[str] = ("train_loop.py",),
    **options: Any,
) -> Command:
    """A run of a preset over the rows, through accelerate launch, streamed from the host."""
    return Command(
        name,
        tuple(
            runs.launched(
                here.place,
                [
                    *before, preset, f"model.id={model}", *here.source, "data.heldout=null",
                    "data.heldout_rows=null", "evaluation.samples=0", "tracking.to=null",
                    "execution.engine=fused", "memory.base=host",
                    f"execution.precision={here.place.precision}",
                    f"run.dir={here.work / 'runs'}", f"run.name={name}", *words,
                ],
                1,
            )
        ),
        run=here.work / "runs" / name,
        **options,
    )  # fmt: skip
