"""Print a run: one line an update, and a progress bar.

On a terminal the lines scroll above the bar; elsewhere they are plain text. What a model generated
is shown with its control characters escaped, so that an answer can neither move the cursor nor pass
for a line of glassloop's own.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
import time
from collections.abc import Iterable
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from glassloop.record.observers import RunInfo, TextPolicy
from glassloop.record.printable import printable
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

WIDTH = 120  # columns of an update's line at most; without extreme values it has 80
HEADING_EVERY = 20  # update lines between two headings
STYLES = {  # by kind of event
    **dict.fromkeys(("skipped", "warning", "alarm", "clipped", "slow", "memory_account"), "yellow"),
    **dict.fromkeys(("stopped", "failed"), "red"),
    "finished": "green",
}
NOT_SHOWN = {
    "answers",
    "reasoning_rows",
    "verdict_rows",
    "answer_tokens_median",
}  # scores that evaluations.jsonl has room for


class _Lasting:
    """A stream that falls silent when its reader is gone.

    rich would end the process at a closed pipe or a lost connection.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the file was closed
                self._gone = True
        return len(text)

    def flush(self) -> None:
        pass  # each write is flushed

    def isatty(self) -> bool:
        return not self._gone and self._stream.isatty()


class TerminalObserver:
    """Prints a run.

    A terminal that goes away ends the printing and not the run.

    Args:
        updates: updates of the whole run.
        ranks: ranks of the run.
        quiet: print nothing.
        text: record.text; under none row ids stay out, under full a sample's prompt is shown too.
        stream: where to print; None: standard output.
    """

    def __init__(
        self,
        updates: int,
        ranks: int,
        quiet: bool = False,
        text: TextPolicy = "ids",
        stream: TextIO | None = None,
    ) -> None:
        self._updates = updates
        self._ranks = ranks
        self._text: TextPolicy = text
        self._quiet = quiet
        self._stream = cast(TextIO, _Lasting(stream or sys.stdout))
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._fancy = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar: Progress | None = None
        self._lines = 0  # update lines so far
        self._since: float | None = None  # clock at the first update's record, s
        self._first_s = 0.0  # wall time of that update

    def header(self, lines: Iterable[str]) -> None:
        """Print what was asked and executed, wrapped on a terminal."""
        for line in lines:
            for piece in _wrapped(line, self._console.width) if self._fancy else [line]:
                self._print(piece)

    def on_start(self, info: RunInfo) -> None:
        self.header(info.lines)
        if self._fancy and not self._quiet:
            columns = (
                TextColumn("{task.completed:.0f}/{task.total:.0f} updates"),
                BarColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)
            self._bar.add_task("", total=self._updates, completed=info.updates_done)
            self._bar.start()

    def on_update(self, record: UpdateRecord, rows: tuple[RowRecord, ...]) -> None:
        left = self._left(record)
        if self._lines % HEADING_EVERY == 0:
            for line in heading(record.updates).splitlines():
                self._print(line, "bold")
        self._lines += 1
        self._print(update_line(record), "yellow" if record.action == "skipped" else "")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record.update, description=left)
        elif self._lines % HEADING_EVERY == 0:
            self._print(f"{record.update}/{record.updates} updates, {left}")

    def on_machine(self, record: MachineRecord) -> None:
        pass

    def on_probe(self, record: ProbeRecord) -> None:
        pass

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._print(f"[{record.update}/{self._updates}] {evaluation_line(record)}", "cyan")

    def on_event(self, event: Event) -> None:
        self._print(
            f"[{event.update}/{self._updates}] {event.kind}: {event.message}",
            STYLES.get(event.kind, ""),
        )
        if event.command and event.kind != "stopped":  # the last line on the screen has that one
            self._print(f"    type: {event.command}")

    def on_sample(self, sample: SampleRecord) -> None:
        row = "a row" if self._text == "none" else sample.row_id
        who = "the base model" if sample.base else "the adapter"
        self._print(
            f"[{sample.update}/{self._updates}] {who} answers {row} in {sample.answer_tokens:,} "
            "tokens:"
        )
        if self._text == "full" and sample.prompt is not None:
            self._block(sample.prompt, "  > ")
        self._block(sample.answer, "  | ")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _block(self, text: str, mark: str) -> None:
        for line in text.split("\n"):
            self._print(mark + line)

    def _print(self, line: str, style: str = "") -> None:
        if self._quiet:
            return
        line = printable(line, self._stream.encoding)
        if self._fancy:
            self._console.print(Text(line, style=style), soft_wrap=True)
        else:
            print(line, file=self._stream)

    def _left(self, record: UpdateRecord) -> str:
        """Return the time left at the mean pace so far.

        The pace includes evaluations and checkpoints.
        """
        now = time.monotonic()
        if self._since is None:
            self._since, self._first_s = now, record.update_s
        seconds = (
            (self._first_s + now - self._since)
            / (self._lines + 1)
            * (record.updates - record.update)
        )
        minutes, seconds = divmod(round(seconds), 60)
        return f"about {minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def heading(updates: int) -> str:
    """Return the titles of `update_line`'s columns, with units below."""
    columns = _columns(updates)
    titles = " ".join(title.rjust(width) for title, _, width in columns)
    units = " ".join(unit.rjust(width) for _, unit, width in columns)
    return f"{titles}\n{units}"


def update_line(record: UpdateRecord) -> str:
    """Word an update in a line.

    "-" stands for a value that does not exist. The clip column is blank if nothing was clipped.

    A skipped update shows its reason in place of tokens and speed; a reason that does not fit into
    WIDTH is cut with an ellipsis, and stands whole in metrics.jsonl.
    """
    clip = record.clip_coef
    cells = [
        f"{record.update}/{record.updates}",
        str(record.epoch),
        f"{record.lr:.2e}",
        _fixed(record.loss_nats),
        "-" if record.grad_norm_pre_clip is None else f"{record.grad_norm_pre_clip:.3g}",
        "-"
        if clip is None
        else ""
        if clip >= 1
        else f"{clip:.4f}"
        if clip >= 0.001
        else f"{clip:.0e}",
        str(record.rows),
        f"{record.supervised_tokens:,}/{record.real_tokens:,}",
        f"{record.real_tokens_per_s:,.0f}",
        f"{record.update_s:.2f}" if record.update_s < 1000 else f"{record.update_s:.0f}",
        "-" if record.rank_peak_gib is None else f"{max(record.rank_peak_gib):.1f}",
    ]
    widths = [width for *_, width in _columns(record.updates)]
    if record.action != "skipped":
        return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    line = " ".join(cell.rjust(width) for cell, width in zip(cells[:5], widths[:5], strict=True))
    line = printable(f"{line} SKIPPED: {record.reason}")
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def evaluation_line(record: EvaluationRecord) -> str:
    """Word held-out loss and scores on one line.

    The base model's value stands in brackets if it differs. Missing scores are left out.
    """
    base = record.base or {}
    scores = {"loss_nats": record.loss_nats} | {
        k: v for k, v in record.scores.items() if k != "loss_nats"
    }
    parts = [
        f"{name} {_score(value)}"
        + (f" (base {_score(base[name])})" if base.get(name) not in (None, value) else "")
        for name, value in scores.items()
        if value is not None and name not in NOT_SHOWN
    ]
    size = (
        f"{record.rows:,} rows, {record.supervised_tokens:,} supervised tokens, "
        f"{record.seconds:.1f} s"
    )
    return f"held-out: {', '.join(parts)} [{size}]"


def _columns(updates: int) -> list[tuple[str, str, int]]:
    """Return title, unit and width of each column.

    The line has 80 columns if a run has at most 99 updates.
    """
    return [
        ("update", "", max(6, 2 * len(str(updates)) + 1)),
        ("ep", "", 3),
        ("lr", "", 8),
        ("loss", "nats", 6),
        ("norm", "", 7),  # before clipping
        ("clip", "", 6),
        ("rows", "", 4),
        ("sup./real", "tokens", 12),
        ("real", "tok/s", 7),  # of all ranks together
        ("", "s", 6),
        ("peak", "GiB", 5),
    ]


def _score(value: float | None) -> str:
    return str(value) if isinstance(value, int) else _fixed(value)


def _fixed(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if not math.isfinite(value) or abs(value) < 1000 else f"{value:.2e}"


def _wrapped(line: str, width: int) -> list[str]:
    """Wrap a line of the header below its text."""
    texts = re.fullmatch(r"(\S* +)?(\S* {2,})?.*", line)
    indent = sum(len(found) for found in texts.groups("")) if texts else 0
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * min(indent, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]
