"""A claim's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from made_runs import write_run

from glassloop.config import Config
from glassloop.record.reading import read_run
from glassloop.study.claims import Claim
from glassloop.study.critical import agreement, critical_of, line_ratio
from glassloop.study.quantities import diverged, measured, norm_scatter, train_loss
from glassloop.study.results import CellResult, Group
from glassloop.study.spec import Cell
from glassloop.study.verdicts import decide, interval, judge

HIGHER = Claim("x", "heldout_loss", {"r": "8"}, {"r": "16"}, "absolute", "higher", 0.0, 0.0, 0.0)
LOWER = dataclasses.replace(HIGHER, expect="lower")
ABOUT = dataclasses.replace(HIGHER, expect="about", value=-0.75, within=0.05)


def group(
    settings: dict[str, str], values: dict[int, float | None], quantity: str = "heldout_loss"
) -> Group:
    name = "-".join(settings.values())
    results = [
        CellResult(
            Cell(f"{name}-seed{seed}", name, settings, seed, Config()),
            "done",
            "",
            {quantity: value},
            {},
            1,
            None,
        )
        for seed, value in values.items()
    ]
    return Group(name, settings, tuple(results))


def test_the_interval_is_students_paired_one() -> None:
    # mean 2, s 1, t(0.975, 2) = 4.302653, / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484138), rel=1e-6)
    # mean 1.05, s 0.0707107, t(0.975, 1) = 12.706205, / sqrt(2)
    assert interval([1.0, 1.1]) == pytest.approx((1.05, 0.635310), rel=1e-5)


@pytest.mark.parametrize(
    ("claim", "by", "verdict"),
    [  # differences 1.0, 1.1, 1.2: 1.1 +- 0.2484138
        (HIGHER, 0.0, "supported"),
        (HIGHER, 0.85, "supported"),
        (HIGHER, 0.86, "not resolved"),
        (HIGHER, 1.34, "not resolved"),
        (HIGHER, 1.35, "contradicted"),
        (LOWER, 0.0, "contradicted"),
    ],
)
def test_a_claim_is_held_to_the_interval_and_to_the_least_difference(
    claim: Claim, by: float, verdict: str
) -> None:
    found, why, numbers = decide(dataclasses.replace(claim, by=by), [1.0, 1.1, 1.2])
    assert found == verdict, why
    assert numbers == pytest.approx((1.1, 0.8515862, 1.3484138), rel=1e-6)


def test_lower_is_the_mirror_of_higher() -> None:
    assert decide(dataclasses.replace(LOWER, by=0.85), [-1.0, -1.1, -1.2])[0] == "supported"
    assert decide(dataclasses.replace(LOWER, by=0.86), [-1.0, -1.1, -1.2])[0] == "not resolved"
    assert decide(dataclasses.replace(LOWER, by=1.35), [-1.0, -1.1, -1.2])[0] == "contradicted"


def test_about_wants_the_whole_interval_inside_and_contradicts_where_it_lies_outside() -> None:
    assert decide(ABOUT, [-0.74, -0.745, -0.74])[0] == "supported"
    assert decide(ABOUT, [-0.64, -0.645, -0.64])[0] == "contradicted"
    assert decide(ABOUT, [-0.86, -0.865, -0.86])[0] == "contradicted"
    assert decide(ABOUT, [-0.70, -0.705, -0.70])[0] == "not resolved"


def test_one_seed_never_resolves_and_none_says_so() -> None:
    verdict, why, numbers = decide(HIGHER, [1e6])
    assert verdict == "not resolved" and numbers is None and "1 seed " in why
    assert decide(HIGHER, [])[0] == "not resolved"


def test_seeds_are_paired_so_that_what_a_seed_does_to_both_cells_is_no_scatter() -> None:
    groups = [
        group({"r": "8"}, {1: 1.02, 2: 2.01, 3: 3.015}),
        group({"r": "16"}, {1: 1.0, 2: 2.0, 3: 3.0}),
    ]
    found = judge(HIGHER, groups, (1, 2, 3))
    assert found.verdict == "supported"
    assert [(pair.seed, pair.value, pair.against) for pair in found.pairs] == [
        (1, 1.02, 1.0),
        (2, 2.01, 2.0),
        (3, 3.015, 3.0),
    ]
    assert found.difference == pytest.approx(0.015)


def test_a_share_is_of_what_it_is_set_against() -> None:
    groups = [group({"r": "8"}, {1: 5.0, 2: 10.0}), group({"r": "16"}, {1: 20.0, 2: 40.0})]
    found = judge(dataclasses.replace(ABOUT, scale="share"), groups, (1, 2))
    assert (found.verdict, found.difference) == ("supported", -0.75)


def test_a_number_may_stand_on_the_other_side() -> None:
    found = judge(
        dataclasses.replace(HIGHER, against=10.0), [group({"r": "8"}, {1: 11.0, 2: 11.2})], (1, 2)
    )
    assert found.pairs[0].difference == pytest.approx(1.0) and found.difference == pytest.approx(
        1.1
    )


def test_axes_that_a_claim_leaves_open_are_averaged_seed_by_seed() -> None:
    groups = [
        group({"r": r, "lr": lr}, {1: base + more, 2: base + more + 0.5})
        for r, base in (("8", 2.0), ("16", 1.0))
        for lr, more in (("a", 0.0), ("b", 0.2))
    ]
    found = judge(HIGHER, groups, (1, 2))
    assert [pair.value for pair in found.pairs] == pytest.approx([2.1, 2.6])
    assert found.difference == pytest.approx(1.0) and found.verdict == "supported"


def test_a_seed_without_a_finite_value_of_both_is_left_out_and_named() -> None:
    groups = [
        group({"r": "8"}, {1: 1.0, 2: math.inf, 3: None}),
        group({"r": "16"}, {1: 0.5, 2: 0.5, 3: 0.5}),
    ]
    found = judge(HIGHER, groups, (1, 2, 3))
    assert found.verdict == "not resolved" and "seed 2, 3" in found.why and len(found.pairs) == 1


def test_quantities_are_those_of_the_records(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", updates=20, ranks=1, faults=False))
    values = measured(run)
    assert values["heldout_loss"] == pytest.approx(1.6 + 2 * math.exp(-3))
    assert values["heldout_gain"] == pytest.approx(3.6 - 1.6 - 2 * math.exp(-3))
    assert values["heldout_rise"] == 0 and values["diverged"] == 0 and values["spikes"] == 0
    losses = [record["loss_nats"] for record in run.updates[-4:]]
    assert values["train_loss"] == pytest.approx(sum(losses) / 4)
    assert values["overfit_gap"] == pytest.approx(values["heldout_loss"] - sum(losses) / 4)
    assert values["noise_scale"] == pytest.approx(900 + 15.5)  # median of updates 11 to 20
    assert (
        values["update_ratio"] == 0.001
        and values["peak_gib"] is None
        and values["load_gib"] is None
    )
    assert values["rows_seen"] == 80 and values["update_s"] == 2.0
    scatter = norm_scatter(run)
    assert scatter is not None and 0.05 < scatter < 0.2  # drawn with 0.1


def test_a_run_that_broke_has_diverged_and_its_spike_is_counted(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    values = measured(run)
    assert values["diverged"] == 1 and values["spikes"] == 1
    raised = read_run(
        write_run(tmp_path / "b", updates=20, ranks=1, faults=False, raised=(10, 5.0))
    )
    assert diverged(raised) == 1 and (train_loss(raised) or 0) > 6
    assert diverged(read_run(write_run(tmp_path / "c", updates=20, ranks=1, faults=False))) == 0


def test_held_out_loss_of_a_run_without_its_last_update_is_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", updates=20, ranks=1, faults=False)
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    (folder / "evaluations.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert measured(read_run(folder))["heldout_loss"] is None


def sweep(
    folder: Path,
    *,
    noise: float,
    squared: float,
    seeds: tuple[int, ...] = (1, 2),
    told: float | None = None,
) -> list[Group]:
    """Make accumulations that follow the formulas exactly.

    The noise scale is noise / squared tokens.
    """
    groups = []
    for accumulation in (1, 2, 4, 8):
        results = []
        for seed in seeds:
            run = write_run(
                folder / f"{accumulation}-{seed}", updates=8, ranks=1, seed=seed, faults=False
            )
            n = 100 * accumulation
            records = [
                json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
            ]
            scale = (noise / squared) if told is None else told
            for record in records:
                record |= {
                    "supervised_tokens": n,
                    "grad_norm_pre_clip": math.sqrt(squared + noise / n),
                }
                record["noise_scale_tokens"] = scale if accumulation > 1 else None
            (run / "metrics.jsonl").write_text(
                "".join(json.dumps(record) + "\n" for record in records)
            )
            evaluations = [
                json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()
            ]
            evaluations[-1]["loss_nats"] = 3.6 - 2.0 / (1 + noise / squared / n)
            (run / "evaluations.jsonl").write_text(
                "".join(json.dumps(record) + "\n" for record in evaluations)
            )
            data = read_run(run)
            settings = {"batch.accumulation": str(accumulation)}
            cell = Cell(f"{accumulation}-seed{seed}", str(accumulation), settings, seed, Config())
            results.append(CellResult(cell, "done", "", measured(data), {}, 1, data))
        groups.append(Group(str(accumulation), results[0].cell.settings, tuple(results)))
    return groups


def test_critical_accumulation_is_found_in_norms_and_losses_that_follow_the_formula(
    tmp_path: Path,
) -> None:
    (found,) = critical_of(sweep(tmp_path, noise=60.0, squared=0.2), "updates")
    assert found.micro_tokens == 100 and found.predicted_by_cell == pytest.approx(
        {2: 300, 4: 300, 8: 300}
    )
    by = {one.by: one for one in found.compared}
    assert set(by) == {"by norms", "by loss"}
    for one in by.values():
        assert one.shown == pytest.approx({1: 300, 2: 300}, rel=1e-6) and one.verdict == "supported"


def test_a_prediction_that_is_far_off_is_contradicted(tmp_path: Path) -> None:
    (found,) = critical_of(sweep(tmp_path, noise=60.0, squared=0.2, told=3000.0), "updates")
    assert [one.verdict for one in found.compared] == ["contradicted", "contradicted"]
    assert "predicted / shown = 10" in found.compared[0].why


def test_equal_rows_name_the_accumulation_up_to_which_none_is_worse(tmp_path: Path) -> None:
    (found,) = critical_of(sweep(tmp_path, noise=60.0, squared=0.2), "rows_seen")
    assert [one.by for one in found.compared] == ["by norms"]
    assert (
        found.equal_rows is not None
        and "accumulation 8 has the lowest" in found.equal_rows
        and "1, 2, 4" in found.equal_rows
    )


def test_a_line_that_does_not_rise_or_starts_below_0_gives_no_number() -> None:
    assert line_ratio([(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]) == pytest.approx(2 / 3)
    assert line_ratio([(1.0, 9.0), (2.0, 7.0), (3.0, 5.0)]) is None
    assert line_ratio([(1.0, 1.0), (2.0, 3.0), (3.0, 5.0)]) is None
    assert line_ratio([(1.0, 5.0), (2.0, 7.0)]) is None


def test_agreement_needs_two_seeds() -> None:
    assert agreement({1: 100.0}, {1: 100.0})[0] == "not resolved"
    assert agreement({1: 100.0, 2: 110.0}, {1: 100.0, 2: 108.0})[0] == "supported"
