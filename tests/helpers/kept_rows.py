"""Rows kept in files, beside the same rows in memory."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from glassloop.config import Config, DataConfig
from glassloop.data.dataset import Dataset, summary
from glassloop.data.stored import lengths_of, supervised_of

ODD = ["", "Ünïcode 🧨 naïve", "He said <s> and <|user|>.", "line\nbreak", "x" * 300]


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Questions of odd kinds: repeated, nearly alike, long, empty, with control tokens."""
    found = []
    for number in range(count):
        question = f"How many legs has animal {number % 17} of the {number // 23} herds here?"
        answer = ODD[number % 11] if number % 11 < len(ODD) else f"It has {number}."
        found.append({"question": question, "answer": answer, **more})
    return found


def folder_of(config: Config) -> Path:
    (folder,) = (Path(str(config.model.cache_dir)) / "rows").iterdir()
    return folder


def same(one: Dataset, other: Dataset, data: DataConfig) -> None:
    """Assert that two datasets say the same."""
    for here, there in ((one.train, other.train), (one.heldout, other.heldout)):
        assert list(here.rows) == list(there.rows)
        assert lengths_of(here.rows) == lengths_of(there.rows)
        assert supervised_of(here.rows) == supervised_of(there.rows)
        assert list(here.untouched_tokens) == list(there.untouched_tokens)
        assert (here.dropped, here.cut, here.faulty) == (there.dropped, there.cut, there.faulty)
        assert (here.facts, here.tokens) == (there.facts, there.tokens)
        count = min(len(here.rows), 3)
        assert tuple(here.examples[:count]) == tuple(there.examples[:count])
        assert len(here.examples) == len(there.examples)
    for name in {field.name for field in fields(one.loaded)} - {"train", "heldout"}:
        assert getattr(one.loaded, name) == getattr(other.loaded, name), name
    names = ("digest", "repeated", "heldout_repeated", "near_across")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    mine, theirs = one.template, other.template
    assert (mine.name, mine.opens_think) == (theirs.name, theirs.opens_think)
    assert (mine.chat_template, mine.why) == (theirs.chat_template, theirs.why)
    assert summary(one, data) == summary(other, data)
