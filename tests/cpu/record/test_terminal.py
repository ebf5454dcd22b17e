"""The terminal shows one honest line an update, safely."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
from typing import Any

import plain_records
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassloop.record import terminal
from glassloop.record.observers import RunInfo
from glassloop.record.records import EvaluationRecord, Event, SampleRecord, UpdateRecord
from glassloop.record.terminal import (
    WIDTH,
    TerminalObserver,
    evaluation_line,
    heading,
    printable,
    update_line,
)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def update_record(update: int = 12, **changes: Any) -> UpdateRecord:
    known = {"epoch": 1, "clip_coef": 0.8104, "rank_peak_gib": (7.5, 7.61)}
    return plain_records.update_record(update, **(known | changes))


def sample(**changes: Any) -> SampleRecord:
    base = SampleRecord(
        60, "train:17", base=False, prompt="a call", expected="scam", answer="scam", answer_tokens=2
    )
    return dataclasses.replace(base, **changes)


def shown(record: UpdateRecord) -> dict[str, str]:
    """Return a line's cells by the titles of its heading."""
    line, titles, end, cells = update_line(record), terminal._columns(record.updates), 0, {}
    for title, unit, width in titles:
        cells[f"{title} {unit}".strip()] = line[end : end + width].strip()
        end += width + 1
    return cells


def test_a_line_shows_each_number_under_a_title_with_its_unit() -> None:
    assert shown(update_record()) == {
        "update": "12/60",
        "ep": "1",
        "lr": "2.00e-04",
        "loss nats": "2.5000",  # the token mean over ranks, not rank 0's 1.0
        "norm": "1.23",
        "clip": "0.8104",
        "rows": "16",
        "sup./real tokens": "400/600",
        "real tok/s": "300",  # (150 + 450) / 2 s; the 2,000 slots do not count
        "s": "2.00",
        "peak GiB": "7.6",
    }
    titles, units = heading(60).splitlines()
    assert len(titles) == len(units) == len(update_line(update_record())) <= 80


def test_a_value_that_does_not_exist_is_a_dash_and_an_idle_clip_is_blank() -> None:
    cells = shown(
        update_record(clip_coef=None, rank_peak_gib=None, loss_nats=None, grad_norm_pre_clip=None)
    )
    assert [cells[title] for title in ("clip", "peak GiB", "loss nats", "norm")] == ["-"] * 4
    assert shown(update_record(clip_coef=1.0))["clip"] == ""
    assert shown(update_record(clip_coef=9e-5))["clip"] == "9e-05"  # not 0.0001, not 0.0000


def test_a_skipped_update_says_so_with_its_reason() -> None:
    record = update_record(
        action="skipped",
        reason="loss is not finite: rank 1, pass 0, row train:17",
        loss_nats=math.nan,
    )
    line = update_line(record)
    assert line.split()[:5] == ["12/60", "1", "2.00e-04", "nan", "1.23"]
    assert line.endswith("SKIPPED: loss is not finite: rank 1, pass 0, row train:17")
    long = update_line(update_record(action="skipped", reason="x" * 500))
    assert len(long) == WIDTH
    assert long.endswith("x…")


numbers = st.floats(0, 1e300) | st.sampled_from([math.nan, math.inf])


@settings(deadline=None)
@given(
    updates=st.integers(1, 99_999),
    loss=st.none() | numbers,
    norm=st.none() | numbers,
    clip=st.none() | st.floats(1e-99, 1),
    lr=st.floats(1e-99, 1),
    tokens=st.integers(1, 9_999_999),
    seconds=st.just(0.0) | st.floats(0.001, 99_999),
    reason=st.none() | st.text(),
)
def test_no_line_is_wider_than_120_columns(
    updates: int,
    loss: float | None,
    norm: float | None,
    clip: float | None,
    lr: float,
    tokens: int,
    seconds: float,
    reason: str | None,
) -> None:
    record = update_record(
        updates,
        updates=updates,
        loss_nats=loss,
        grad_norm_pre_clip=norm,
        clip_coef=clip,
        lr=lr,
        supervised_tokens=tokens,
        rank_real_tokens=(tokens,),
        update_s=seconds,
        rank_peak_gib=(139.81,),
        reason=reason,
        action="applied" if reason is None else "skipped",
    )
    assert len(printable(update_line(record))) <= WIDTH
    assert max(map(len, heading(updates).splitlines())) <= WIDTH


def run_all(observer: TerminalObserver) -> None:
    observer.on_start(
        RunInfo(
            "runs/a",
            updates=60,
            ranks=2,
            lines=("asked 2 rows x 2 ranks x 4", "executed as [literal]"),
        )
    )
    observer.on_update(update_record(1), ())
    observer.on_evaluation(
        EvaluationRecord(update=1, loss_nats=2.0, rows=4, supervised_tokens=50, scores={"f1": 0.5})
    )
    observer.on_event(
        Event(1, "checkpoint", "saved update_000001", command="glassloop generate runs/a")
    )
    observer.on_sample(sample())
    observer.close()


def test_without_a_terminal_all_is_plain_lines() -> None:
    stream = io.StringIO()
    run_all(TerminalObserver(60, 2, stream=stream))
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines() == [
        "asked 2 rows x 2 ranks x 4",
        "executed as [literal]",
        *heading(60).splitlines(),
        update_line(update_record(1)),
        "[1/60] held-out: loss_nats 2.0000, f1 0.5000 [4 rows, 50 supervised tokens, 0.0 s]",
        "[1/60] checkpoint: saved update_000001",
        "    type: glassloop generate runs/a",
        "[60/60] the adapter answers train:17 in 2 tokens:",
        "  | scam",
    ]


def test_on_a_terminal_the_same_lines_scroll_above_a_bar() -> None:
    screen, standard = Screen(), sys.stdout
    observer = TerminalObserver(60, 2, stream=screen)
    run_all(observer)
    seen = screen.getvalue()
    for line in (
        "executed as [literal]",
        *heading(60).splitlines(),
        update_line(update_record(1)),
        "    type: glassloop generate runs/a",
    ):
        assert line in seen  # whole: not wrapped, and brackets are no markup
    assert "1/60 updates" in seen
    assert "left" in seen
    assert "\x1b[?25h" in seen  # the cursor is back
    assert sys.stdout is standard


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    observer = TerminalObserver(60, 2, stream=screen)
    observer.on_start(RunInfo("runs/a", updates=60, ranks=2))
    for u in range(1, 21):
        observer.on_update(update_record(u), ())
    assert "\x1b" not in screen.getvalue()
    assert (
        "\n20/60 updates, about " in screen.getvalue()
    )  # it has no bar, so the time left is on a line


@pytest.mark.parametrize("stream", [io.StringIO(), Screen()])
def test_quiet_prints_nothing(stream: io.StringIO) -> None:
    run_all(TerminalObserver(60, 2, quiet=True, stream=stream))
    assert stream.getvalue() == ""


HOSTILE = (
    "\x1b[2J\x1b]0;title\x07\r[bold]no markup[/bold] :smile: \u202ekcab\x9b31m\n12/60 "
    "fine\u2028more\ttab"
)


@pytest.mark.parametrize("stream_type", [io.StringIO, Screen])
def test_a_generated_answer_cannot_steer_the_terminal_or_pass_for_a_line(
    stream_type: type[io.StringIO],
) -> None:
    stream = stream_type()
    observer = TerminalObserver(60, 2, stream=stream)
    observer.on_sample(sample(answer=HOSTILE))
    observer.on_event(Event(1, "warning", HOSTILE, command=HOSTILE))
    seen = stream.getvalue()
    for harmful in ("\x1b[2J", "\x1b]0", "\x07", "\r", "\u202e", "\x9b", "\u2028", "\t"):
        assert harmful not in seen
    assert "[bold]no markup[/bold] :smile: " in seen
    assert r"\x1b[2J" in seen
    plain = [
        line
        for line in seen.split("\n")
        if "fine" in line and "warning" not in line and "type:" not in line
    ]
    assert len(plain) == 1
    assert "  | 12/60 fine" in plain[0]


def test_printable_keeps_ordinary_writing() -> None:
    text = "naïve ｜ 漢字 한국어 🦙\u00a0\u3000می\u200cخواهم"
    assert printable(text) == text
    assert printable("a\u00e9", "ascii") == r"a\xe9"
    assert printable("lone \ud800") == r"lone \ud800"


def test_a_prompt_is_shown_under_full_only_and_an_id_not_under_none() -> None:
    seen = {}
    for text in ("none", "ids", "full"):
        stream = io.StringIO()
        TerminalObserver(60, 2, text=text, stream=stream).on_sample(sample())
        seen[text] = stream.getvalue()
    assert ["a call" in seen[text] for text in seen] == [False, False, True]
    assert ["train:17" in seen[text] for text in seen] == [False, True, True]


def test_an_evaluation_shows_the_base_beside_the_adapter_and_no_empty_score() -> None:
    scores = {"loss_nats": 2.0, "answers": 8, "f1": 0.75, "recall": None}
    base = {"loss_nats": 2.5, "answers": 8, "f1": 0.25, "recall": None}
    record = EvaluationRecord(20, 2.0, 64, 5678, scores, base, seconds=12.34)
    assert evaluation_line(record) == (
        "held-out: loss_nats 2.0000 (base 2.5000), f1 0.7500 (base 0.2500) [64 rows, 5,678 "
        "supervised tokens, 12.3 s]"
    )


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return self.terminal

    terminal = False


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_that_is_gone_does_not_end_the_run(is_terminal: bool) -> None:
    stream = Gone()
    stream.terminal = is_terminal
    run_all(TerminalObserver(60, 2, stream=stream))


def test_a_stream_without_the_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    observer = TerminalObserver(60, 2, stream=io.TextIOWrapper(raw, encoding="ascii"))
    observer.on_sample(sample(answer="é｜"))
    assert b"\\xe9\\uff5c" in raw.getvalue()


def test_time_left_follows_the_pace_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    observer = TerminalObserver(60, 2, stream=stream)
    for u in range(1, 21):  # 2 s for the first, then one every 4 s, evaluations and all
        observer.on_update(update_record(u), ())
        clock[0] += 4.0
    assert (
        stream.getvalue().splitlines()[-1] == "20/60 updates, about 0:02:36 left"
    )  # (2 + 19 x 4) / 20 x 40 = 156 s
    observer.on_update(update_record(21), ())
    assert stream.getvalue().splitlines()[-3:] == [
        *heading(60).splitlines(),
        update_line(update_record(21)),
    ]


def test_the_header_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    lines = [
        "model     smollm2, nf4, loaded in 1.0 s",
        "data      template     chat (auto: the tokenizer's own); 0 of 40 assistant turns have "
        "no reasoning",
        "executed  literal, the micro-batches asked for; explicit reduction, 2 x CPU (1 thread a "
        "rank); engine peft",
        f"          {'parameters':22}{'dtype':9}",
    ]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        TerminalObserver(3, 1, stream=stream).header(lines)
    assert plain.getvalue().splitlines() == lines
    shown = terminal.getvalue().splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[0] == lines[0]
    assert shown[1:3] == [lines[1][:80], " " * 23 + "have no reasoning"]
    assert shown[4] == " " * 10 + "thread a rank); engine peft"
    assert shown[-1] == lines[-1].rstrip()
