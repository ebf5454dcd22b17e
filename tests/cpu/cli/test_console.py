"""The console command: modules, near names, refusals in one line."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glassloop
from glassloop import cli
from glassloop.cli.__main__ import command_names, main

ROOT = Path(__file__).resolve().parents[3]
COMMAND = '''"""Echo the words.

More than the first line.
"""


def main(argv):
    if argv == ["refuse"]:
        raise ValueError("batch.size = 0: must be at least 1")
    if argv == ["missing"]:
        open("/no/such/file")
    if argv == ["broken"]:
        raise RuntimeError("a fault of ours")
    if argv == ["full"]:
        raise RuntimeError("CUDA error: out of memory\\nCUDA kernel errors might be late")
    if argv == ["wait"]:
        input()
    print("got", *argv)
    return 7 if argv == ["seven"] else None
'''


@pytest.fixture
def echo_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command of its own, echo-twice, and a private module beside it."""
    (tmp_path / "echo_twice.py").write_text(COMMAND, encoding="utf-8")
    (tmp_path / "_hidden_away.py").write_text(
        "raise AssertionError('never imported')\n", encoding="utf-8"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("glassloop.cli.echo_twice", None)
    vars(cli).pop("echo_twice", None)


@pytest.mark.usefixtures("echo_twice")
def test_a_command_gets_the_rest_of_the_words_and_gives_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["echo-twice", "--show", "3"]) == 0
    assert capsys.readouterr().out == "got --show 3\n"
    assert main(["echo-twice", "seven"]) == 7


@pytest.mark.usefixtures("echo_twice")
def test_words_come_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["glassloop", "echo-twice", "a"])
    assert main() == 0
    assert capsys.readouterr().out == "got a\n"


@pytest.mark.usefixtures("echo_twice")
@pytest.mark.parametrize("typed", ["echo_twice", "echo-twise", "ecotwice"])
def test_an_unknown_command_names_the_nearest(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"glassloop: {typed} is no command. Did you mean echo-twice?\n")


@pytest.mark.usefixtures("echo_twice")
def test_a_command_unlike_any_lists_all_and_says_how_to_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["zzz"]) == 2
    err = capsys.readouterr().err
    assert "echo-twice" in err
    assert "glassloop train FILE" in err


@pytest.mark.usefixtures("echo_twice")
def test_help_lists_each_command_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "echo-twice Echo the words." in out
    assert "More than the first line" not in out
    assert "hidden" not in out


def test_no_words_print_the_help_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: glassloop COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"glassloop {glassloop.__version__}\n"


@pytest.mark.usefixtures("echo_twice")
@pytest.mark.parametrize(
    ("word", "reason"),
    [("refuse", "batch.size = 0: must be at least 1"), ("missing", "'/no/such/file'")],
)
def test_a_refusal_is_said_without_a_traceback(
    word: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["echo-twice", word]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("refused: ")
    assert err.endswith(f"{reason}\n(GLASSLOOP_TRACEBACK=1 shows where)\n")


@pytest.mark.usefixtures("echo_twice")
def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSLOOP_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"batch\.size"):
        main(["echo-twice", "refuse"])


@pytest.mark.usefixtures("echo_twice")
def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="fault of ours"):
        main(["echo-twice", "broken"])


@pytest.mark.usefixtures("echo_twice")
def test_a_card_without_memory_is_named_and_has_a_cure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["echo-twice", "full"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ended: a card has no memory left: CUDA error: out of memory. See what")
    assert "CUDA_VISIBLE_DEVICES" in err and err.endswith("TRACEBACK=1 shows where)\n")


def test_a_reader_that_leaves_early_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "echo_twice.py").write_text(COMMAND, encoding="utf-8")
    code = (
        "import sys; from glassloop import cli; from glassloop.cli.__main__ import main\n"
        f"cli.__path__.append({str(tmp_path)!r}); sys.exit(main(['echo-twice', 'wait']))"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    os.close(reading)  # before the command prints: it waits for its input
    _, err = process.communicate(b"\n", timeout=60)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_a_main_and_a_summary(name: str) -> None:
    module = importlib.import_module(f"glassloop.cli.{name.replace('-', '_')}")
    assert next(iter(inspect.signature(module.main).parameters)) == "argv"
    summary = (inspect.getdoc(module) or "").partition("\n")[0]
    assert 0 < len(summary) <= 110, (
        f"glassloop/cli/{name}.py: the docstring's first line is what --help shows"
    )


def test_bitsandbytes_stays_silent_about_kernels_that_training_never_uses() -> None:
    code = (
        "import logging, glassloop; logger = logging.getLogger('bitsandbytes'); "
        "assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
