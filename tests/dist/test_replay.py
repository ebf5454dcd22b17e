"""Updates of two ranks, replayed on one process bit for bit; a fault on rank 1 is found there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import HERE, launch, write_rows
from planted import spoiled_base, sure_base

from glassloop.cli.__main__ import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("replay")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][511] = math.nan

    model = spoiled_base(sure_base(tiny_llama, folder / "sure"), folder / "model", spoil)
    launch(
        HERE / "replaying.py", str(folder), str(model), str(write_rows(folder / "rows.jsonl", 21))
    )
    return folder / "runs"


def replayed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["replay", *map(str, words), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize(
    ("run", "update", "origin"),
    [
        ("literal", 5, "its capsule"),
        ("literal", 3, "its capsule"),
        ("literal", 6, "update_000003"),
        ("literal", 2, "the beginning"),
        ("packed", 2, "the beginning"),
        ("ddp", 2, "its capsule"),
        ("ddp", 1, "the beginning"),
    ],
)
def test_an_update_of_two_ranks_comes_back_bit_for_bit_on_one_process(
    runs, capsys, run, update, origin
):
    found = replayed(capsys, runs / run, "--update", update)
    assert origin in found["origin"]
    assert found["bit_for_bit"]
    assert all(one["loss_off"] == one["norm_off"] == 0 for one in found["updates_rerun"])
    names = {one["name"] for one in found["compared"]}
    assert {"loss of rank 0", "loss of rank 1"} < names
    assert ("norm of rank 1" in names) == (run != "ddp")


def test_a_row_on_rank_1_that_costs_50_times_the_others_is_found_there_and_is_the_cause(
    runs, capsys
):
    found = replayed(capsys, runs / "row", "--update", 4, "--bisect", "--try")
    walk = found["bisection"]
    assert found["bit_for_bit"]
    assert walk["row"]["name"] == "row:bad"
    assert walk["row"]["loss_factor"] > 50
    assert walk["rank"]["name"] == "rank 1"
    assert walk["one_pass"]["name"] == "rank 1, pass 1"
    assert found["trials"]["verdict"]["kind"] == "data"
    assert found["next"].endswith(f"--resume {runs / 'row'} --at 0 --without-window 4")


def test_a_nan_on_rank_1_only_is_found_at_its_row_module_and_place(runs, capsys):
    found = replayed(capsys, runs / "nan", "--update", 4, "--bisect", "--try")
    walk = found["bisection"]
    assert found["bit_for_bit"]
    assert [one["recorded"] for one in found["compared"] if one["name"] == "loss of rank 1"] == [
        "nan"
    ]
    assert walk["rank"]["name"] == "rank 1"
    assert walk["row"]["name"] == "row:nan"
    assert (
        walk["layer"]["message"]
        == "embed_tokens is the first module whose output is not finite, first at place 10"
    )
    assert found["trials"]["verdict"]["kind"] == "data"
