"""`glassloop bench`: options, refusals, a dry run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench_lines import judged, line, specs

from glassloop.bench import results, table
from glassloop.bench.sums import digest_of
from glassloop.cli import bench as bench_command
from glassloop.data.rows import Row


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workloads", "poems"], "--workloads poems: there are"),
        (["--engines", "steam"], "--engines steam: there are peft, "),
        (["--workloads", "own"], "--workloads own and data.source=... belong together"),
        (
            ["--workloads", "own,full-v1", "data.source=x.csv"],
            "belong together, and other workloads have rows of their own",
        ),
        (["--workloads", "full-v1", "data.source=x.csv"], "belong together"),
        (["--checkpointing", "maybe"], "--checkpointing maybe: say on, off"),
    ],
)
def test_the_command_refuses_what_is_not_there(words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bench_command.main(["--device", "cpu", *words])


def test_the_command_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="run it without accelerate launch"):
        bench_command.main([])


def test_a_dry_run_lists_the_arms(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        bench_command.main(
            ["--device", "cpu", "--dry-run", "--ranks", "1,2", "--layouts", "literal"]
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 8


@pytest.mark.parametrize(
    "words",
    [
        ["--vary", "lora.r=8,16"],
        ["--vary", "execution.backend="],
        ["--python", "unsloth=/nowhere/python"],
    ],
)
def test_a_list_or_interpreter_that_means_nothing_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_command.main(["--device", "cpu", *words])
    assert words[1] in capsys.readouterr().err


def test_lists_of_varied_fields_are_multiplied(capsys: pytest.CaptureFixture[str]) -> None:
    lists = [
        "--engines",
        "fused",
        "--workloads",
        "full-v1",
        "--layouts",
        "literal",
        "--repeats",
        "1",
    ]
    words = ["--vary", "memory.profile=min,fill", "--vary", "execution.deterministic=true,false"]
    assert bench_command.main(["--device", "cpu", "--dry-run", *lists, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 5 and "memory.profile=fill, deterministic=true" in lines[3]
    )  # the first is the check's own


def test_a_source_means_the_same_in_an_arms_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    assert bench_command._anywhere("data.source=rows.csv") == f"data.source={tmp_path / 'rows.csv'}"
    assert (
        bench_command._anywhere("data.source=BothBosu/scam-dialogue")
        == "data.source=BothBosu/scam-dialogue"
    )
    assert bench_command._anywhere("run.name=rows.csv") == "run.name=rows.csv"


def test_digest_moves_with_ids_and_labels() -> None:
    row = Row("a", (1, 2, 3), (False, True, True))
    assert digest_of([row]) != digest_of([replace(row, input_ids=(1, 2, 4))])
    assert digest_of([row]) != digest_of([replace(row, supervised=(False, False, True))])
    assert digest_of([row]) == digest_of([replace(row, row_id="b")])


def test_a_reference_that_only_serves_the_check_is_not_shown() -> None:
    reference = line(12345.0) | {"check_only": True}
    packed = line(2000.0, layout="packed")
    shown = "\n".join(table.table(judged(reference, packed)))
    assert "2,000" in shown and "12,345" not in shown


def test_other_rows_are_no_reference() -> None:
    one = line(layout="packed") | {"rows_digest": "other ids of the same lengths"}
    assert results.checked(one, [line()])["within"] is None


def test_memory_is_varied_for_the_engine_that_has_a_choice_and_shown_in_its_row():
    found = specs(
        engines=["peft", "fused"],
        workloads=["scam-v1"],
        layouts=["literal"],
        ranks=[1],
        varied=[("memory.profile=min",), ("memory.profile=fill",)],
    )
    assert [(one.engine, one.varied) for one in found] == [
        ("peft", ()),
        ("fused", ("memory.profile=min",)),
        ("fused", ("memory.profile=fill",)),
    ]
