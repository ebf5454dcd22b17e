"""What `glassloop plan` prints."""

from __future__ import annotations

import json

import pytest
from schemas import conform

from glassloop.cli.plan import main


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def flat(text: str) -> str:
    return " ".join(text.split())


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return conform("plan", json.loads(said(capsys, *words, "--json")))
