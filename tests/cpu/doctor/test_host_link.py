"""Whether a base can stream from this host, as doctor finds out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from glassloop.cli.doctor import check_stream
from glassloop.config import Config
from glassloop.doctor import host_link
from glassloop.doctor.findings import NOTE, OK, PROBLEM
from glassloop.doctor.host_link import Link, try_link


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a shell script instead of Python in the process that measures."""

    def as_script(text: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(host_link.sys, "executable", str(path))

    return as_script


def test_the_last_line_of_the_process_is_its_answer(program, tmp_path: Path) -> None:
    program("""echo a warning; echo '{"pages": "file", "alone_gbs": 5, "both_ways_gbs": 4}'""")
    assert try_link(tmp_path) == Link("file", "", 5, 4)


def test_a_process_that_fails_or_hangs_says_so(program, tmp_path: Path) -> None:
    program("echo before >&2; echo no driver >&2; exit 3")
    assert try_link(tmp_path) == Link("none", "no driver")
    program("exec sleep 60")
    started = time.monotonic()
    assert try_link(tmp_path, limit_s=0.5) == Link("none", "no answer within 0 s")
    assert time.monotonic() - started < 20


def test_without_a_driver_the_real_process_fails_with_its_reason(tmp_path: Path) -> None:
    found = try_link(tmp_path)
    if found.pages == "none":  # this machine has no card
        assert found.refused and found.alone_gbs is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("link", "base", "level", "words"),
    [
        (
            Link("file", "", 55.04, 47.0),
            "auto",
            OK,
            "read only; 55.0 GB/s to the card, 47.0",
        ),
        (Link("copy", "error 801", 12.0, 9.0), "host", OK, "shared memory is locked, since"),
        (Link("none", "error 801"), "auto", NOTE, "cannot stream from this host: error 801"),
        (Link("none", "error 801"), "host", PROBLEM, "cannot stream from this host: error 801"),
        (Link("none", "error 801"), 12, PROBLEM, "cannot stream from this host: error 801"),
    ],
)
def test_what_is_found_is_a_problem_only_where_the_run_needs_it(
    link: Link, base: str | int, level: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(host_link, "try_link", lambda folder: link)
    values = {"memory": {"base": base}, "model": {"cache_dir": str(tmp_path)}}
    (found,) = check_stream(Config.model_validate(values), 1)
    assert found.level == level and words in found.text
    assert (level == OK) == (not found.cure)


def test_without_a_card_nothing_is_tried() -> None:
    (found,) = check_stream(Config(), 0)
    assert found.level == NOTE and "needs a GPU" in found.text
