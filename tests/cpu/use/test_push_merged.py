"""`glassloop push --merged`: whole folders of the same adapter, with their table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trained_runs import copy_of

from glassloop.cli.__main__ import main


@pytest.fixture
def run(pushed: Path) -> Path:
    return pushed


def test_a_torn_merged_folder_is_not_published(run, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(["merge", str(run), str(whole), "--no-table", "--shard-gib", "0.0001"]) == 0
    shards = sorted(path.name for path in whole.glob("model-*.safetensors"))
    torn, short = copy_of(whole, tmp_path / "torn"), copy_of(whole, tmp_path / "short")
    other = copy_of(whole, tmp_path / "other")
    (torn / shards[1]).write_bytes((torn / shards[1]).read_bytes()[:-9])
    (short / shards[0]).unlink()
    shutil.copy(other / shards[0], other / shards[1])
    for folder, name, word in (
        (torn, shards[1], "cut short"),
        (short, shards[0], "missing"),
        (other, shards[1], "lacks"),
    ):
        assert (
            main(
                [
                    "push",
                    str(run),
                    "me/m",
                    "--merged",
                    str(folder),
                    "--dry-run",
                    str(tmp_path / "out"),
                ]
            )
            == 2
        )
        told = capsys.readouterr().err
        assert name in told and word in told and "merge again" in told, told


def test_merged_weights_go_with_their_table_and_only_with_their_own_adapter(
    run, tmp_path, capsys, tiny_llama
):
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert (
        main(
            [
                "push",
                str(run),
                "me/m",
                "--merged",
                str(tmp_path / "merged"),
                "--dry-run",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "README.md",
        "tokenizer.json",
    } <= names
    assert not {"SERVE.txt", "adapter_model.safetensors"} & names
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "What merging changed" in text
        and "library_name: transformers" in text
        and "16-bit weights" in text
    )
    assert (
        "the adapter, before it was merged" in text and "this model" not in text
    )  # the merged weights did not answer
    assert "Answers of the merged weights" in text.partition("## What was not measured")[2]
    facts = json.loads((tmp_path / "merged" / "glassloop_merge.json").read_text())
    (tmp_path / "merged" / "glassloop_merge.json").write_text(
        json.dumps(facts | {"bits": 4, "table": []})
    )
    assert (
        main(
            [
                "push",
                str(run),
                "me/m",
                "--merged",
                str(tmp_path / "merged"),
                "--dry-run",
                str(tmp_path / "four"),
            ]
        )
        == 0
    )
    text = (tmp_path / "four" / "README.md").read_text()
    assert (
        "4-bit weights" in text
        and "merged without the table" in text
        and "no answer says scam" in text
    )
    (tmp_path / "merged" / "glassloop_merge.json").write_text(
        json.dumps(facts | {"adapter": "1" * 16})
    )
    assert (
        main(
            [
                "push",
                str(run),
                "me/m",
                "--merged",
                str(tmp_path / "merged"),
                "--dry-run",
                str(tmp_path / "two"),
            ]
        )
        == 2
    )
    assert "another adapter" in capsys.readouterr().err
