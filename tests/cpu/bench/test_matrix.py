"""Arms: their order, processes, turns and rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_lines import line, specs

from glassloop.bench import results, table
from glassloop.bench.arm import build
from glassloop.bench.matrix import run_matrix, schedule, unable
from glassloop.bench.processes import Place, Start, command, environment, run_arm, run_together
from glassloop.bench.spec import Spec, read_spec
from glassloop.bench.workloads import workload


def test_arms_take_turns_and_every_repeat_begins_with_another() -> None:
    order = schedule(specs(), 3)
    assert len(order) == 24
    by_repeat = [[spec.name for spec in order if spec.repeat == repeat] for repeat in range(3)]
    assert [spec.repeat for spec in order] == [0] * 8 + [1] * 8 + [2] * 8
    assert sorted(by_repeat[0]) == sorted(by_repeat[1]) == sorted(by_repeat[2])
    assert len({names[0] for names in by_repeat}) == 3
    assert all(
        "literal, 2 rows, 1 rank," in name for name in by_repeat[0][:2]
    )  # references first: others are held to them


def test_a_matrix_without_the_reference_gets_one_for_its_check() -> None:
    order = schedule(specs(layouts=["packed"], workloads=["scam-v1"]), 2)
    first, *rest = order
    assert results.is_reference(first.cell) and (first.updates, first.warmup, first.workload) == (
        1,
        1,
        "scam-v1",
    )
    assert len(rest) == 4 and not any(results.is_reference(spec.cell) for spec in rest)


def test_specs_travel_whole_and_are_launched_as_their_ranks_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = specs(workloads=["scam-v1"], layouts=["packed"])
    two.write(tmp_path / "spec.json")
    assert read_spec(tmp_path / "spec.json") == two
    (tmp_path / "spec.json").write_text('{"engine": "peft", "colour": "red"}')
    with pytest.raises(ValueError, match="is no spec of an arm"):
        read_spec(tmp_path / "spec.json")
    assert command(one, tmp_path)[1:3] == ["-m", "glassloop.bench.arm"]
    words = command(two, tmp_path)
    assert (
        "accelerate.commands.launch" in words and words[words.index("--num_processes") + 1] == "2"
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert "LOCAL_RANK" not in environment(one, Place("cpu", 0))
    cuda = replace(two, device="cuda")
    assert environment(cuda, Place("cuda", 3))["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "ACCELERATE_BYPASS_DEVICE_MAP" in environment(cuda, Place("cuda", 1))
    assert Place("cuda", 1).backend(2) == "gloo" and Place("cuda", 2).backend(2) == "auto"
    with pytest.raises(ValueError, match="at least one of each"):
        replace(two, warmup=0)


def test_a_varied_field_makes_arms_and_none_of_them_is_the_reference() -> None:
    varied = [("execution.backend=auto",), ("execution.backend=gloo",)]
    order = schedule(specs(workloads=["scam-v1"], layouts=["literal"], ranks=[1], varied=varied), 1)
    assert [spec.varied for spec in order] == [(), *varied] and order[0].check_only
    assert [spec.name.rpartition(", ")[2] for spec in order] == [
        "recomputed",
        "backend=auto",
        "backend=gloo",
    ]
    assert not results.is_reference(order[1].cell)
    held = line(varied=("execution.backend=gloo",), layout="literal", loss=7.5)
    assert results.checked(held, [line()])["within"] is False
    # a line that an older glassloop wrote has no such field
    old = line()
    del old["cell"]["varied"]
    assert (
        results.is_reference(old["cell"])
        and results.checked(line(layout="packed"), [old])["within"]
    )


def test_an_engine_that_cannot_run_here_is_left_out_and_told_why(tmp_path: Path) -> None:
    said: list[str] = []
    spec = replace(specs(workloads=["scam-v1"], layouts=["packed"], ranks=[1])[0], engine="unsloth")
    (one,) = run_matrix(
        [spec], Place("cpu", 0), tmp_path / "arms", tmp_path / "out", said.append, {}
    )
    assert (
        one["left_out"]
        and "not installed" in one["failed"]
        and "environment of its own" in one["failed"]
    )
    shown = table.table([one])
    assert shown[0] == "no arm was measured and passed its check"
    assert (
        shown[1].startswith("left out: unsloth, scam-v1, packed")
        and "left out: it is not installed" in said[0]
    )
    assert results.read(tmp_path / "out")[0]["check"] == {
        "within": None,
        "why": "it was not measured",
    }
    assert unable(spec, {"unsloth": "/an/environment/bin/python"}) is None
    assert unable(replace(spec, engine="peft"), {}) is None


def test_an_engines_arms_may_have_an_interpreter_of_their_own(tmp_path: Path) -> None:
    one, two = specs(workloads=["scam-v1"], layouts=["packed"])
    assert (
        command(one, tmp_path, "/env/bin/python")[0]
        == command(two, tmp_path, "/env/bin/python")[0]
        == "/env/bin/python"
    )


def test_own_rows_are_those_of_the_users_source(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    source = tmp_path / "mine.jsonl"
    source.write_text(
        "".join(f'{{"prompt": "question {i}", "completion": "answer {i}"}}\n' for i in range(11))
    )
    how = dict(
        updates=2,
        warmup=1,
        device="cpu",
        overrides=(f"data.source={source}", "data.template=instruct"),
    )
    spec = Spec("peft", "own", "literal", 1, 2, 4, "random:tiny", "fp32", **how)  # type: ignore[arg-type]
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    AcceleratorState._reset_state(True)
    run = build(spec, folders[0])
    assert len(run.batches.rows) == 11
    windows = [run.batches.window(u) for u in (1, 2, 3)]  # 11 rows: two whole updates an epoch
    assert [len(window.rows) for window in windows] == [4, 4, 4]
    assert len({*windows[0].rows, *windows[1].rows}) == 8
    run.close_observers()
    AcceleratorState._reset_state(True)
    with pytest.raises(
        ValueError,
        match=r"data.source gives 11 rows, and an update takes 12: lower --rows-per-update",
    ):
        build(replace(spec, rows_per_update=12), folders[1])


def test_update_1_has_the_workloads_first_rows_whatever_the_number_of_updates(
    tmp_path: Path,
) -> None:
    from accelerate.state import AcceleratorState

    rows = workload("scam-v1", 8, vocabulary=512)
    for number, updates in enumerate((1, 2)):
        AcceleratorState._reset_state(True)
        folder = tmp_path / str(number)
        folder.mkdir()
        spec = Spec(
            "peft",
            "scam-v1",
            "literal",
            1,
            2,
            4,
            "random:tiny",
            "fp32",
            updates=updates,
            warmup=1,
            device="cpu",
        )
        run = build(spec, folder)
        first, second = (
            [run.batches.rows[row] for row in run.batches.window(u).rows] for u in (1, 2)
        )
        assert first == list(rows[:4]) and second == list(rows[4:8])
        run.close_observers()


TURNS = """
import json, sys, time
from pathlib import Path
from glassloop.bench.clock import Clock
from glassloop.bench.spec import read_spec
log, how = sys.argv[1:]
spec = read_spec(Path("spec.json"))
said = lambda what: open(log, "a").write(f"{spec.engine} {what}\\n")
calls = dict(wait=lambda: None, rest=lambda: said("rest"), wake=lambda: said("wake"))
clock = Clock(spec, Path.cwd(), uuid=None, first_rank=True, **calls)
for u in range(1, spec.total_updates + 1):
    clock.begin(u)
    said(f"begin {u}")
    if u == 4 and how == "dies":
        sys.exit("no more memory")
    time.sleep(60 if u == 4 and how == "hangs" else 0.02)
    said(f"end {u}")
    clock.end(u)
times = {"kept": clock.measured_update_s, "left": clock.warmup_update_s}
Path(spec.out).write_text(json.dumps(spec.about | {"turns_s": clock.turns_s} | times))
"""


def in_turns(
    tmp_path: Path, *hows: str, timeout_s: float = 30.0, **how: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of stand-ins named a, b, ..

    that take three turns of one update before and two that count, and what they wrote one after the
    other.
    """
    (tmp_path / "arm.py").write_text(TURNS)
    one = replace(specs(workloads=["scam-v1"], layouts=["packed"], ranks=[1])[0], turns=3)
    starts = [
        Start(
            replace(one, engine=name),
            [sys.executable, str(tmp_path / "arm.py"), str(tmp_path / "log"), how],
            tmp_path / name,
        )
        for name, how in zip("abc", hows, strict=False)
    ]
    lines = run_together(starts, Place("cpu", 0), timeout_s, **how)
    return lines, (tmp_path / "log").read_text().splitlines()


def test_side_by_side_one_arm_computes_at_a_time_and_every_round_begins_with_another(
    tmp_path: Path,
) -> None:
    lines, log = in_turns(tmp_path, "well", "well", first_alone=True)
    whole = [
        f"{name} {what}"
        for u in (1, 4, 7)
        for name in "ab"
        for v in range(u, u + 3)
        for what in (f"begin {v}", f"end {v}")
    ]
    order = [entry for entry in log if "rest" not in entry and "wake" not in entry]
    turns = [order[start : start + 6] for start in range(0, 36, 6)]
    assert sorted(order) == sorted(whole) and all(
        len({entry[0] for entry in turn}) == 1 for turn in turns
    )
    assert [turn[0] for turn in turns] == [
        "a begin 1",
        "b begin 1",
        "b begin 4",
        "a begin 4",
        "a begin 7",
        "b begin 7",
    ]
    assert [log.count(f"a {what}") for what in ("rest", "wake")] == [
        2,
        2,
    ]  # nothing to give back after the last
    for one in lines:
        assert (len(one["turns_s"]), len(one["kept"]), len(one["left"])) == (3, 6, 3)
        assert all(
            0.04 <= seconds < 1 for seconds in one["turns_s"]
        )  # two updates, and no waiting for the others


@pytest.mark.parametrize(
    ("how", "why"), [("dies", "exit code 1: no more memory"), ("hangs", "longer than 1.5 s")]
)
def test_an_arm_that_fails_in_its_turn_does_not_hold_up_the_others(
    tmp_path: Path, how: str, why: str
) -> None:
    (bad, good), log = in_turns(tmp_path, how, "well", timeout_s=1.5)
    assert why in bad["failed"] and bad["name"].startswith("a, ") and len(good["turns_s"]) == 3
    assert log[-1] == "b end 9" and "a end 4" not in log


def turned(
    engine: str, seconds: list[float], peak: float | None = None, **more: Any
) -> dict[str, Any]:
    turns = [{"seconds": one, "real_tokens": 1000} for one in seconds]
    own = dict(
        turns=turns,
        warmup_s=[9.0] * len(seconds),
        update_s={"all": seconds},
        peak={"allocated_gib": peak},
    )
    return line(engine=engine, **more) | own | {"check": {"within": True}}


def test_a_ratio_is_taken_turn_by_turn() -> None:
    ours, theirs = turned("fused", [1.0, 2.0, 4.0], 6.0), turned("unsloth", [2.0, 3.0, 8.0], 7.0)
    (said,) = table.beside([ours, theirs, turned("trl", [1.0, 1.0, 1.0])], ["unsloth"])[:1]
    assert (
        said.startswith("fused, scam-v1")
        and "/ unsloth: 2.00 (1.50 to 2.00, 3 turns); peak 6.00 and 7.00 GiB" in said
    )
    assert said.endswith("6 updates in 34.0 and 40.0 s")
    arm = results.arms([ours])[0]
    assert (arm.tokens_per_s, arm.spread) == (500.0, (250.0, 1000.0)) and len(arm.rates) == 3
    other_rows = turned("unsloth", [1.0, 1.0, 1.0]) | {"rows_digest": "others"}
    assert table.beside([ours, other_rows], ["unsloth"]) == []
    assert table.beside([ours, theirs | {"check": {"within": False}}], ["unsloth"]) == []


@pytest.mark.thorough
def test_an_arm_that_cannot_run_leaves_a_line_that_says_why(tmp_path: Path) -> None:
    spec = Spec("peft", "scam-v1", "literal", 1, 3, 8, "random:tiny", "fp32", device="cpu")
    line = run_arm(spec, Place("cpu", 0), tmp_path / "arm", timeout_s=120)
    assert (
        "batch.rows_per_update = 8 is not a multiple" in line["failed"]
        and line["cell"]["batch"] == 3
    )
    slow = run_arm(spec, Place("cpu", 0), tmp_path / "slow", timeout_s=0.2)
    assert "took longer than 0.2 s" in slow["failed"]
