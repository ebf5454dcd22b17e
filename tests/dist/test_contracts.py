"""The plan is a contract: a line broken on rank 1 stops both ranks at that update.

The message has the planned and the counted number.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import HERE, ROOT, TWO_CPUS, launch, write_rows


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict:
    folder = tmp_path_factory.mktemp("contracts")
    launch(
        HERE / "contracts.py",
        str(folder),
        str(tiny_llama),
        str(write_rows(folder / "rows.jsonl", 21)),
    )
    return json.loads((folder / "contracts.json").read_text())


def both(contracts: dict, check: str):
    first, second = contracts[check]
    assert first == second
    return first


@pytest.mark.parametrize(
    ("check", "numbers"),
    [
        ("row_lost", "planned 5 rows, counted 4"),
        ("row_twice", "planned 5 rows, counted 6"),
        ("label_lost", "planned 68 supervised tokens, counted 67"),
        ("token_lost", "planned 167 real tokens, counted 166"),
        ("other_lr", "planned 0.008 lr, counted 0.004"),
    ],
)
def test_a_broken_line_stops_the_run_before_anything_is_applied(contracts, check, numbers):
    result = both(contracts, check)
    assert result["error"].startswith(f"update 3: {numbers};")
    assert result["unchanged"]


def test_the_plan_of_a_whole_run_is_its_ledger(contracts):
    result = both(contracts, "plan_and_ledger")
    assert result["code"] == 0
    assert result["planned"] == result["counted"]
    assert result["planned"]["rows"] == [8, 8, 5, 8, 8, 5]
    assert result["facts"]["processes"] == 2
    assert (
        result["facts"]["trainable parameters"] == 8192
    )  # 4 x (in + out) of seven projections in two layers


def test_a_rank_without_memory_makes_both_go_on_with_the_same_rows_in_smaller_passes(contracts):
    result = both(contracts, "out_of_memory")
    smaller = result["smaller"]
    assert smaller["code"] == 0
    assert [(rows, action) for _, rows, action, _, _ in smaller["updates"]] == [
        (rows, "applied") for rows, _ in result["plain"]
    ]
    assert [passes for _, _, _, passes, _ in smaller["updates"]] == [
        [2, 2],
        [4, 4],
        [3, 2],
        [4, 4],
        [4, 4],
        [3, 2],
    ]
    for (_, _, _, _, loss), (_, expected) in zip(smaller["updates"], result["plain"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
    (message,) = [message for kind, message in smaller["events"] if kind == "out_of_memory"]
    assert "rank 1 ran out of memory in update 2" in message
    assert "batch.size=1 batch.rows_per_update=8" in message


def test_or_both_stop_where_that_is_asked(contracts):
    stop = both(contracts, "out_of_memory")["stop"]
    assert stop["code"] == 1
    assert [update for update, *_ in stop["updates"]] == [1]
    assert [kind for kind, _ in stop["events"]][-2:] == ["checkpoint", "failed"]


def test_the_preflight_computes_the_heaviest_pass_and_changes_nothing(contracts):
    result = both(contracts, "preflights")["sound"]
    assert (result["error"], result["unchanged"]) == (None, True)
    slots = 2 * result["longest"][0]
    assert result["events"] == [
        [
            "preflight",
            f"the heaviest pass of each rank ({slots} slot tokens at most) fits and is finite",
        ]
    ]


def test_the_preflight_refuses_what_is_not_finite_and_names_the_rows(contracts):
    result = both(contracts, "preflights")["nan"]
    assert "not finite on rank 1" in result["error"]
    assert result["longest"][1] in result["error"]
    assert result["unchanged"]


def test_the_preflight_finds_passes_that_fit_or_says_what_would(contracts):
    results = both(contracts, "preflights")
    assert (results["halved"]["error"], results["halved"]["halvings"]) == (None, 1)
    assert results["halved"]["unchanged"]
    assert "rank 1 ran out of memory" in results["full"]["error"]
    assert "a smaller data.max_tokens" in results["full"]["error"]


def test_a_run_does_not_go_on_with_other_rows(contracts):
    assert "the rows are not those that the run began with" in both(
        contracts, "other_rows_on_resume"
    )


def test_a_compiler_that_arrives_through_the_launcher_is_refused(tmp_path: Path, tiny_llama: Path):
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    words = [
        f"model.id={tiny_llama}",
        f"data.source={rows}",
        "data.template=chat",
        f"run.dir={tmp_path}",
        "execution.precision=fp32",
    ]
    config = tmp_path / "launch.yaml"
    config.write_text(TWO_CPUS.read_text() + "dynamo_config:\n  dynamo_backend: EAGER\n")
    output = launch(ROOT / "train_loop.py", *words, expect=1, config_file=config)
    assert "compiler of the launcher: planned NO, found EAGER" in output
