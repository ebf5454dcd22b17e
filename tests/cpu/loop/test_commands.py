"""Commands that a run tells people to type: they parse, and they quote what needs it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from glassloop.cli import generate
from glassloop.loop.commands import CALL, generate_command


@pytest.mark.parametrize(
    ("form", "asked"), [("scam", CALL), ("auto", "YOUR QUESTION"), ("alpaca", "YOUR QUESTION")]
)
def test_the_command_that_asks_a_run_is_one_that_generate_takes(form: str, asked: str) -> None:
    folder = Path("runs/it's mine")
    program, command, *words = shlex.split(generate_command(folder, form))
    assert (program, command) == ("glassloop", "generate")
    assert words[0] == str(folder)
    assert words[-1] == asked
    assert ("--call" in words) == (form == "scam")
    with pytest.raises(ValueError, match="it's mine"):  # not refused for its words
        generate.main(words)
