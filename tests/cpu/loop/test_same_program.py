"""Ranks that do not run one program are refused, with what differs and each rank's value."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from glassloop.config.arguments import parse
from glassloop.loop import same_program
from glassloop.loop.same_program import PLACES, program, require_same_program

WORDS = ["data.template=chat", "schedule.updates=20"]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `others` answer beside this rank; counts the gathers."""

    def set_up(*others: Any) -> list[Any]:
        asked: list[Any] = []

        def gather(mine: Any) -> list[Any]:
            asked.append(mine)
            digests = len(asked) == 1
            return [mine, *(_answer(other, mine, digests=digests) for other in others)]

        monkeypatch.setattr(same_program, "is_distributed", lambda: True)
        monkeypatch.setattr(same_program, "gather_objects", gather)
        return asked

    return set_up


def _answer(other: Any, mine: dict[str, Any], *, digests: bool) -> Any:
    if not isinstance(other, dict):
        return other
    return {part: same_program._digest(other[part]) if digests else other[part] for part in mine}


def test_ranks_that_run_one_program_pass_with_one_gather(ranks) -> None:
    config = parse(WORDS)
    asked = ranks(program(config), program(config))
    require_same_program(config)
    assert len(asked) == 1
    assert set(asked[0]) == {"code", "config", "libraries"}
    assert all(len(digest) == 64 for digest in asked[0].values())


@pytest.mark.parametrize(
    ("part", "name", "value", "told"),
    [
        ("config", "optimizer.lr", "0.5", "optimizer.lr: rank 0: {mine}; rank 1: 0.5"),
        (
            "config",
            "optimizer.max_grad_norm",
            "7.0",
            "optimizer.max_grad_norm: rank 0: {mine}; rank 1: 7.0",
        ),
        ("libraries", "peft", "0.1", "peft: rank 0: {mine}; rank 1: 0.1"),
        ("libraries", "python", "3.9.0", "python: rank 0: {mine}; rank 1: 3.9.0"),
        ("libraries", "triton", "3.4.0", "triton: rank 0: {mine}; rank 1: 3.4.0"),
        (
            "code",
            "glassloop/formula/loss.py",
            "f" * 64,
            "glassloop/formula/loss.py: rank 0: sha256 {mine:.12}; rank 1: sha256 ffffffffffff",
        ),
        ("code", "train_loop.py", "e" * 64, "rank 1: sha256 eeeeeeeeeeee"),
        ("code", "glassloop/new.py", "d" * 64, "new.py: rank 0: nothing; rank 1: sha256 dddddd"),
    ],
)
def test_a_difference_is_named_with_each_ranks_value(ranks, part, name, value, told) -> None:
    config = parse(WORDS)
    mine = program(config)
    other = deepcopy(mine)
    other[part][name] = value
    ranks(other)
    with pytest.raises(ValueError, match="ranks run different programs") as refused:
        require_same_program(config)
    assert told.format(mine=mine[part].get(name, "")) in str(refused.value)
    assert str(refused.value).count(" rank 1: ") == 1
    assert "start all ranks with one command" in str(refused.value)


def test_ranks_that_agree_stand_together_and_a_flood_is_cut(ranks) -> None:
    config = parse(WORDS)
    mine = program(config)
    other = deepcopy(mine)
    other["code"] = dict.fromkeys(mine["code"], "0" * 64)
    ranks(mine, other)
    with pytest.raises(ValueError, match=r"ranks 0, 1: sha256 \w+; rank 2: sha256 0+") as refused:
        require_same_program(config)
    assert f"and {len(mine['code']) - same_program.SHOWN} more" in str(refused.value)


def test_a_rank_that_does_not_know_the_question_is_named(ranks) -> None:
    config = parse(WORDS)
    ranks(None)
    with pytest.raises(ValueError, match="rank 1 runs an older glassloop than this one"):
        require_same_program(config)


def test_places_may_differ_by_host_and_are_fields_of_the_config() -> None:
    words = [*WORDS, "data.source=/host1/rows.jsonl", "run.dir=/host1/runs", "run.name=a"]
    assert program(parse(words)) == program(parse(WORDS))
    fields = same_program._leaves(same_program.as_dict(parse(WORDS)))
    assert set(PLACES) <= set(fields)


def test_secrets_stay_out_of_the_message(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx")
    config = parse(WORDS)
    other = deepcopy(program(config))
    other["config"]["model.revision"] = '"hf_abcdefghijklmnopqrstuvwx"'
    ranks(other)
    with pytest.raises(ValueError, match=r"\(hidden\)") as refused:
        require_same_program(config)
    assert "hf_abc" not in str(refused.value)


def test_every_file_of_the_package_and_the_loop_itself_count() -> None:
    root = Path(same_program.__file__).parents[2]
    files = {str(path.relative_to(root)) for path in (root / "glassloop").rglob("*.py")}
    assert set(program(parse(WORDS))["code"]) == {*files, "train_loop.py"}
