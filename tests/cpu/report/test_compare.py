"""Comparisons find where runs part, and when a verdict is due."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import SPIKE, write_run

from glassloop.cli.__main__ import main
from glassloop.record.reading import RunData, read_run
from glassloop.report.comparing import compare
from glassloop.report.verdict import welch


def made(folder: Path, **settings) -> RunData:
    return read_run(write_run(folder, **{"faults": False, **settings}))


def edit(folder: Path, name: str, change) -> None:
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(change(line) or line) + "\n" for line in lines))


def test_equal_runs_are_the_same(tmp_path: Path) -> None:
    found = compare([made(tmp_path / "a"), made(tmp_path / "b")])
    (pair,) = found.pairs
    assert (pair.verdict, pair.went_in, pair.came_out, pair.compared) == (
        "the same",
        None,
        None,
        40,
    )
    assert found.differences == ()


def test_the_first_parting_names_update_rank_and_quantity(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")

    def louder(record: dict) -> None:
        if record["update"] >= 17:
            record["rank_grad_norm"][1] *= 1.001
            record["grad_norm_pre_clip"] *= 1.0005

    edit(b.folder, "metrics.jsonl", louder)
    (pair,) = compare([a, read_run(b.folder)]).pairs
    parting = pair.came_out
    assert parting is not None and (parting.update, parting.rank, parting.quantity) == (
        17,
        1,
        "gradient norm",
    )
    assert parting.off == pytest.approx(1e-3, rel=0.01)
    assert pair.verdict == "not resolved" and "still they part" in pair.why
    (pair,) = compare([a, read_run(b.folder)], floor=0.01).pairs
    assert pair.verdict == "the same"


def test_other_rows_are_told_apart_from_another_result(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")

    def swapped(row: dict) -> None:
        if row["update"] == 9 and row["rank"] == 1:
            row["row_id"] += "x"

    edit(b.folder, "rows.jsonl", swapped)
    (pair,) = compare([a, read_run(b.folder)]).pairs
    assert pair.went_in is not None and (
        pair.went_in.update,
        pair.went_in.rank,
        pair.went_in.quantity,
    ) == (9, 1, "rows")
    assert pair.came_out is None


def test_a_fault_is_found_where_it_was_planted(tmp_path: Path) -> None:
    (pair,) = compare([made(tmp_path / "a"), made(tmp_path / "b", faults=True)]).pairs
    assert (
        pair.came_out is not None
        and pair.came_out.update <= SPIKE
        and pair.came_out.quantity in ("loss", "gradient norm")
    )


def test_one_seed_a_side_is_not_resolved(tmp_path: Path) -> None:
    found = compare([made(tmp_path / "a"), made(tmp_path / "b", lr=4e-4, raised=(1, 5.0))])
    assert [side.label for side in found.sides] == ["A", "B"]
    assert ("optimizer.lr", (2e-4, 4e-4)) in found.differences
    (pair,) = found.pairs
    assert pair.verdict == "not resolved" and "one seed" in pair.why
    three = compare(
        [made(tmp_path / "c"), made(tmp_path / "d", seed=2), made(tmp_path / "e", lr=4e-4)]
    )
    assert three.pairs[0].verdict == "not resolved" and "side B" in three.pairs[0].why


def losses(run: RunData, value: float) -> RunData:
    edit(run.folder, "evaluations.jsonl", lambda one: one.update(loss_nats=value))
    return read_run(run.folder)


def test_seeds_resolve_what_is_beyond_their_spread_and_nothing_else(tmp_path: Path) -> None:
    a = [losses(made(tmp_path / f"a{seed}", seed=seed), 2 + 0.01 * seed) for seed in (1, 2, 3)]
    near = [
        losses(made(tmp_path / f"n{seed}", seed=seed, lr=3e-4), 1.99 + 0.02 * seed)
        for seed in (1, 2, 3)
    ]
    far = [
        losses(made(tmp_path / f"f{seed}", seed=seed, lr=4e-4), 1.5 + 0.01 * seed)
        for seed in (1, 2, 3)
    ]
    found = compare([*a, *near, *far])
    assert [(pair.verdict, pair.same_seed) for pair in found.pairs] == [
        ("not resolved", True),
        ("C is lower", True),
    ]
    assert found.measure == "held-out loss after update 40, nats a token"
    assert compare([*far, *a]).pairs[0].verdict == "A is lower"


def test_without_held_out_rows_the_last_training_losses_are_judged(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a"), made(tmp_path / "b", lr=4e-4)]
    for run in runs:
        (run.folder / "evaluations.jsonl").unlink()
    assert (
        compare([read_run(run.folder) for run in runs]).measure
        == "mean training loss of updates 33 to 40, nats a token"
    )


def test_repeats_measure_the_floor_unless_they_part_by_more_than_noise(tmp_path: Path) -> None:
    a, again, other = made(tmp_path / "a"), made(tmp_path / "again"), made(tmp_path / "b", lr=4e-4)
    edit(again.folder, "metrics.jsonl", lambda one: one.update(loss_nats=one["loss_nats"] * 1.0001))
    found = compare([a, read_run(again.folder), other])
    assert found.floor == pytest.approx(4e-4, rel=0.01) and "repeats" in found.floor_from
    edit(again.folder, "metrics.jsonl", lambda one: one.update(loss_nats=one["loss_nats"] * 1.5))
    found = compare([a, read_run(again.folder), other])
    assert found.floor == 1e-5 and "no noise" in found.floor_from


def test_ranks_may_differ_and_all_that_both_have_is_compared(tmp_path: Path) -> None:
    (pair,) = compare([made(tmp_path / "a"), made(tmp_path / "b", ranks=4)]).pairs
    assert (
        pair.went_in is not None and pair.went_in.rank is None and pair.went_in.quantity == "rows"
    )


def test_welch_agrees_with_a_case_worked_out_by_hand() -> None:
    difference, half = welch([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    # variances 1 and 4, so s^2 = 1/3 + 4/3 and df = (5/3)^2 / ((1/9 + 16/9) / 2) = 50/17; t(0.975,
    # 50/17) = 3.2195
    assert difference == 4.0 and half == pytest.approx(3.2195 * (5 / 3) ** 0.5, rel=1e-3)


def test_the_command_prints_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = made(tmp_path / "a[red]"), made(tmp_path / "b", lr=4e-4)
    assert main(["compare", str(a.folder), str(b.folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "a[red]" in out and "optimizer.lr" in out and "not resolved" in out and "noise floor" in out
    )
    assert (tmp_path / "compare-a[red]-b.html").exists()


@pytest.mark.parametrize(
    ("words", "complaint"), [([], "at least two"), (["--floor", "2"], "between 0 and 1")]
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(["compare", str(made(tmp_path / "a").folder), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_run_without_an_update_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_run(tmp_path / "empty", updates=0, faults=False)
    assert main(["compare", str(made(tmp_path / "a").folder), str(empty)]) == 2
    assert "no update on record" in capsys.readouterr().err
