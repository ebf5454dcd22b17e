"""A replay's search says how far it is, and how long it will still take."""

from __future__ import annotations

import io

from glassloop.replay.progress import EVERY_S, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_estimate_follows_from_the_parts_that_are_done() -> None:
    out, now = io.StringIO(), [0.0]
    tell = Progress("try", out, clock=lambda: now[0])
    tell(0, 8, "as it was")
    now[0] = 4.0
    tell(1, 8, "half the lr")  # too soon for another line
    now[0] = EVERY_S + 2
    tell(2, 8, "32-bit AdamW")
    tell.close()
    assert out.getvalue().splitlines() == [
        "try       1 of 8: as it was",
        "try       3 of 8: 32-bit AdamW, about 36 s left",
    ]


def test_a_terminal_has_one_line_that_is_free_at_the_end() -> None:
    out, now = Terminal(), [0.0]
    tell = Progress("bisect", out, clock=lambda: now[0])
    for done in range(3):
        tell(done, 3, "row " * 40)
        now[0] += 2
    tell.close()
    lines = out.getvalue().split("\r\033[K")
    assert len(lines) == 5 and lines[0] == lines[-1] == ""
    assert all(len(line) < 80 and "\n" not in line for line in lines)
    assert "about 2 s left" not in lines[2]  # cut with the line


def test_a_search_that_never_began_prints_nothing() -> None:
    out = Terminal()
    Progress("try", out).close()
    assert out.getvalue() == ""
