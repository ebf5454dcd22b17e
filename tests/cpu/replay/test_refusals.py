"""What replay refuses, and what it takes from a record without text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from planted import spoiled_base
from replayed import as_object, command, trained

# What is not the run's


def test_what_cannot_be_replayed_is_refused_with_its_name_and_the_cure(whole, tmp_path, capsys):
    capsule = whole / "capsules" / "update_000007"
    for words, complaint in (
        ([whole, "--update", 99], "--update 99 is not on record in"),
        ([whole, "--update", 0], "--update 0 is not on record"),
        ([whole], "--update is missing: which update of"),
        ([tmp_path], "is neither a run's folder"),
        ([tmp_path / "nowhere"], "is no folder"),
        ([capsule, "--update", 3], "--update 3: "),
        ([whole, "--update", 7, "optimizer.lr=1"], "--try varies lr"),
        ([whole, "--update", 7, "--base", tmp_path / "none"], "model.id"),
        ([whole, "--update", 7, "--bisekt"], "glassloop replay: did you mean --bisect?"),
    ):
        code, output = command(capsys, *words)
        assert code == 2, output
        assert complaint in output
        assert "Traceback" not in output


def test_a_missing_update_names_the_capsules_that_there_are(whole, capsys):
    assert "Capsules hold 3 (healthy), 7 (asked); any other is re-run" in command(capsys, whole)[1]


@pytest.mark.parametrize("update", [7, 6])
def test_another_base_is_refused_by_hash(whole, tiny_llama, tmp_path, capsys, update):
    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][0] += 0.5

    other = spoiled_base(tiny_llama, tmp_path / "other", nudge)
    code, output = command(capsys, whole, "--update", update, "--base", other)
    assert code == 2
    assert "has changed, or is another base" in output


def test_a_base_that_has_moved_is_named_with_base(whole, tiny_llama, tmp_path, capsys):
    shutil.copytree(tiny_llama, tmp_path / "moved")
    for update in (7, 6):
        assert as_object(capsys, whole, "--update", update, "--base", tmp_path / "moved")[
            "bit_for_bit"
        ]


def test_changed_data_are_refused_by_row(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    lines = (whole.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"completion": row["completion"] + " and more of it"}) + "\n"
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    with_it = next(
        record["update"]
        for record in map(json.loads, (run / "rows.jsonl").read_text().splitlines())
        if record["row_id"] == "train:4" and record["update"] != 7
    )
    code, output = command(
        capsys, run, "--update", max(with_it, 4), f"data.source={tmp_path / 'rows.jsonl'}"
    )
    assert code == 2
    assert "the data have changed: row train:4 of update" in output


@pytest.mark.parametrize("update", [5, 4])
def test_without_text_on_record_rows_come_from_the_data_and_are_not_named(silent, capsys, update):
    assert as_object(capsys, silent, "--update", update)["bit_for_bit"]
    code, output = command(capsys, silent, "--update", update, "--bisect")
    assert code == 0
    assert "train:" not in output
    assert "token id" not in output
    walk = as_object(capsys, silent, "--update", update, "--bisect")["bisection"]
    assert walk["rows"][0]["name"].startswith("row ")
    assert "token_id" not in walk["tokens"][0]


@pytest.mark.parametrize("update", [5, 4])
def test_without_text_on_record_changed_data_are_refused(silent, tmp_path, capsys, update):
    lines = (silent.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    longer = [
        json.dumps(json.loads(line) | {"completion": "one two three four five six seven eight"})
        + "\n"
        for line in lines
    ]
    (tmp_path / "rows.jsonl").write_text("".join(longer))
    code, output = command(
        capsys, silent, "--update", update, f"data.source={tmp_path / 'rows.jsonl'}"
    )
    assert code == 2
    assert "changed" in output


def test_text_is_shown_under_full_only(tmp_path, tiny_llama, capsys):
    run = trained(
        tmp_path,
        tiny_llama,
        record={"text": "full", "capture_updates": [2]},
        schedule={"updates": 2, "warmup_updates": 1},
    )
    tokens = command(capsys, run, "--update", 2, "--bisect")[1].partition("Tokens of")[2]
    assert tokens.splitlines()[2].split() == ["place", "loss", "token", "id", "text"]
    assert (
        len(
            {line.split()[3] for line in tokens.splitlines()[3:13]}
            & set("abcdefghijklmnopqrstuvwxyz")
        )
        > 1
    )


def test_ids_only_show_no_text(whole, capsys):
    output = command(capsys, whole, "--update", 7, "--bisect")[1]
    tokens = output.partition("Tokens of")[2].splitlines()
    assert tokens[2].split() == ["place", "loss", "token", "id"]
    assert all(len(line.split()) == 3 for line in tokens[3:13])


# How it looks


def test_every_line_but_the_command_fits_120_columns(whole, capsys):
    code, output = command(capsys, whole, "--update", 8, "--bisect", "--try")
    assert code == 0
    lines = output.splitlines()
    assert lines[-1].startswith("next      ")
    assert max(map(len, lines[:-1])) <= 120
    assert output.count("\nverdict   ") == 1
    assert "try       1 of 8: as it was" in lines
    assert lines[0].startswith("bisect    1 of ")


def test_the_next_command_leads_on(whole, capsys):
    for words, following in (([], "--bisect"), (["--bisect"], "--try")):
        found = as_object(capsys, whole, "--update", 7, *words)
        assert found["next"] == f"glassloop replay {whole} --update 7 {following}"
