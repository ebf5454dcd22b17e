"""A stranger's study is bounded, and nothing is followed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import yaml
from strange_folders import change, shown

from glassloop.disk.opening import NotPlain
from glassloop.study import running
from glassloop.study.answers import Answers
from glassloop.study.answers_text import render
from glassloop.study.spec import cells_of, read_study

GOOD = """
name: one
question: Does it?
base: batch.size=4 batch.accumulation=4 schedule.updates=12
axes:
  lora.r: [8, 16]
  clip: {clipped: {optimizer.max_grad_norm: 1.0}, free: {optimizer.max_grad_norm: null}}
seeds: [1, 2]
parallel: 1
measure: [loss]
timeout_s: 60
claims:
  - {says: x, quantity: heldout_loss, cell: {lora.r: 8}, against: {lora.r: 16}, expect: higher}
  - {says: y, quantity: norm_median, cell: {lora.r: 8}, against: 2.0, expect: lower, by: 0.1}
"""
CLAIM = "axes: {lora.r: [8, 16]}\nclaims: [{says: x, quantity: heldout_loss, cell: {lora.r: 8}, "
BAD = {
    "an alias bomb": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 20)),
        "aliases stand for more than 100,000 values",
    ),
    "a grid without end": (
        "axes:\n" + "".join(f"  a{i}: {{x: {{}}, y: {{}}}}\n" for i in range(40)),
        r"make 3,298,534,883,328 cells, 10,000 at most",
    ),
    "another run to resume": (
        "base: --resume=/runs/other\naxes: {lora.r: [8]}\n",
        "names its cells' folders itself",
    ),
    "cells without end beside each other": (
        f"axes: {{lora.r: [8]}}\nparallel: {10**400}\n",
        r"parallel = 1000.*\.\.\.: a whole number from 1 to 1,000,000",
    ),
    "a bound that is no number": (
        CLAIM + "against: {lora.r: 16}, expect: higher, by: .nan}]\n",
        r"claims\[1\]\.by = nan: a number",
    ),
    "a value that is infinite": (
        CLAIM + "against: .inf, expect: higher}]\n",
        r"claims\[1\]\.against = inf: a finite number",
    ),
    "a list as a quantity": (
        CLAIM.replace("heldout_loss", "[a]") + "against: 1, expect: higher}]\n",
        r"claims\[1\]\.quantity = \['a'\]: not measured",
    ),
}


def written(folder: Path, text: str) -> Path:
    (folder / "one.yaml").write_text(text)
    return folder / "one.yaml"


@pytest.mark.parametrize("text, told", BAD.values(), ids=BAD)  # noqa: PT006
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"{path}.*{told}"):
        cells_of(read_study(path), tmp_path)


def test_any_value_anywhere_is_taken_or_refused_with_the_file(tmp_path: Path) -> None:
    for seed in range(120):
        drawn = random.Random(seed)
        value = yaml.safe_load(GOOD)
        where = [change(value, drawn) for _ in range(drawn.choice([1, 2]))]
        path = written(tmp_path, yaml.safe_dump(value))
        try:
            cells_of(read_study(path), tmp_path)
        except ValueError as error:
            assert str(path) in str(error), (where, error)


@pytest.mark.parametrize("name", ["cells", "locks", "logs", "asked", "attempts.jsonl"])
def test_a_study_writes_through_no_link(tmp_path: Path, name: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    if name == "attempts.jsonl":
        elsewhere.write_text("")
    else:
        elsewhere.mkdir()
    (out / name).symlink_to(elsewhere)
    cells = cells_of(read_study(written(tmp_path, GOOD)), out)
    with pytest.raises(NotPlain, match=f"{name} is a link"):
        running.run_cells(cells, out, parallel=1, timeout_s=1, say=lambda _line: None)
    if elsewhere.is_dir():
        assert os.listdir(elsewhere) == []
    else:
        assert elsewhere.read_text() == ""


def test_attempts_that_were_edited_are_refused(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"cell": "a", "seconds": "long"}\n')
    with pytest.raises(ValueError, match=r"attempts\.jsonl: cell = 'a', seconds = 'long'"):
        running.attempts(tmp_path)


def test_a_question_is_not_obeyed_by_a_terminal(tmp_path: Path) -> None:
    text = GOOD.replace("Does it?", '"\\e]0;owned\\a\\e[2J"').replace("says: x", 'says: "\\e[31m"')
    study = read_study(written(tmp_path, text))
    said = shown(render(Answers(study, [], [], [], [], [])))
    assert "\\x1b" in said and "\x1b" not in said and "\a" not in said
