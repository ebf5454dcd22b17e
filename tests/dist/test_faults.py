"""A fault on one of two ranks: both ranks decide alike, and the record names the fault.

No rank applies half an update.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from launching import HERE, launch, write_rows

from glassloop.plan.steps import lr_at

ROWS = 21


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict:
    folder = tmp_path_factory.mktemp("faults")
    launch(
        HERE / "faults.py",
        str(folder),
        str(tiny_llama),
        str(write_rows(folder / "rows.jsonl", ROWS)),
    )
    return json.loads((folder / "faults.json").read_text())


def both(faults: dict, check: str):
    """What a check returned, once it is known that both ranks returned the same."""
    first, second = faults[check]
    for result in (first, second):
        for time in (
            [key for key in result if str(key).endswith("_s")] if isinstance(result, dict) else ()
        ):
            del result[time]
    assert first == second
    return first


def test_two_ranks_apply_the_schedule_of_one(faults):
    closed_form = [
        lr_at(u, updates=20, warmup=5, peak=1e-2, kind="linear", first="peak_over_warmup")
        for u in range(1, 21)
    ]
    assert both(faults, "learning_rates_of_20_updates") == closed_form
    assert closed_form[-1] > 0


def test_a_slow_disk_delays_a_stop_and_cuts_nothing_short(faults):
    found = both(faults, "a_disk_that_syncs_slowly")
    assert found["waited"] > 2.0  # beyond the patience of 1.5 s, for a capsule, with a stop asked
    assert (found["code"], found["checkpoint"], found["notes"]) == (0, "update_000003", [])


def test_a_fused_engine_that_is_off_on_one_rank_is_taken_by_none(faults):
    found = both(faults, "fused_is_off_on_rank_1")
    assert found["named"].startswith("execution.engine = fused: ")
    assert "set execution.engine=peft" in found["named"]
    assert found["engine"] == "peft"
    assert sum("the run takes peft" in line for line in found["told"]) == 1
    first, second = found["ranks"]
    assert first != second and min(first, second) < found["loss"] < max(first, second)


def test_ranks_with_another_config_or_code_are_refused_by_field_and_file(faults):
    lr = both(faults, "other_lr_on_rank_1")
    assert "optimizer.lr: rank 0: 0.01; rank 1: 0.02\n" in lr
    code = both(faults, "other_code_on_rank_1")
    assert "glassloop/formula/loss.py: rank 0: sha256 " in code
    assert "rank 1: sha256 ffffffffffff" in code


def test_a_folder_that_is_written_is_refused_on_every_rank(faults):
    first, second = faults["folder_of_a_living_run"]
    assert "is being written by process " in first
    assert second.startswith("locking ")
    assert "failed on another rank (rank 0: Held: " in second
    assert first in second


def test_a_nan_on_rank_1_is_skipped_by_both_and_names_rank_pass_and_row(faults):
    by_rank = faults["nan_on_rank_1"]
    for result in by_rank:
        assert result["action"] == "skipped"
        assert result["nonfinite"]
        assert result["unchanged"]
        assert f"rank 1, pass 1, row {result['row']}" in result["reason"]
    assert math.isnan(by_rank[0]["loss_nats"])


def test_an_infinite_gradient_behind_a_finite_loss_names_the_rank(faults):
    result = both(faults, "infinite_gradient_on_rank_1")
    assert result["action"] == "skipped"
    assert result["unchanged"]
    assert "gradient is not finite on rank 1" in result["reason"]


def test_the_logged_loss_is_the_token_mean_over_ranks(faults):
    result = both(faults, "losses_of_unequal_ranks")
    assert result["tokens"][0] != result["tokens"][1]
    assert result["ranks"] == [1.0, 3.0]
    assert result["logged"] == pytest.approx(result["mean"], rel=1e-7)


def test_out_of_memory_on_rank_1_ends_both_before_anything_is_reduced(faults):
    result = both(faults, "out_of_memory_on_rank_1")
    assert "rank 1 ran out of memory in update 1" in result["error"]
    assert "batch.size=1 batch.rows_per_update=8" in result["error"]
    assert result["unchanged"]


def test_a_run_that_ends_for_a_nan_keeps_the_last_good_state_and_says_how_to_go_on(faults):
    result = both(faults, "nan_ends_the_run")
    assert (result["code"], result["checkpoint"]) == (1, "update_000001")
    assert result["last"]["kind"] == "failed"
    assert "update 2 was not applied: loss is not finite: rank 1" in result["last"]["message"]
    assert result["last"]["command"].endswith("--without-window 2")


def test_a_stop_asked_of_one_rank_gives_the_update_up_on_both(faults):
    result = both(faults, "stop_asked_on_rank_1")
    assert result["given_up"]
    assert result["unchanged"]
    assert result["then"] == "applied"


def test_a_window_without_labels_is_skipped_named_and_nobody_hangs(faults):
    result = both(faults, "nothing_supervised")
    assert (result["action"], result["loss_nats"], result["grad_norm_pre_clip"]) == (
        "skipped",
        None,
        None,
    )
    assert "no supervised token in its 8 rows (train:" in result["reason"]
    assert result["unchanged"]
    assert result["next"] == "applied"


def test_a_forward_past_ddps_wrapper_is_caught_by_the_next_update(faults):
    result = both(faults, "unwrapped_forward")
    assert result["caught_at"] == 2
    assert "no longer equal before update 2" in result["error"]


def test_the_whole_gradient_is_clipped_and_the_norm_before_that_is_logged(faults):
    result = both(faults, "clipping")
    free, clipped = result["norms"]["None"], result["norms"]["0.001"]
    assert free[1] is None
    assert clipped[0] == pytest.approx(free[0], rel=1e-6) == pytest.approx(free[2], rel=1e-6)
    assert clipped[1] == pytest.approx(1e-3 / free[0], rel=1e-6)
    assert clipped[2] == pytest.approx(1e-3, rel=1e-5)


def test_the_cosine_and_norms_of_ranks_add_up_to_the_whole(faults):
    result = both(faults, "clipping")
    a, b = result["rank_norms"]
    whole = result["norms"]["None"][0]
    assert math.sqrt(a * a + b * b + 2 * a * b * result["rank_cosine"]) == pytest.approx(
        whole, rel=1e-5
    )


def test_evaluating_and_generating_between_updates_changes_no_bit(faults):
    assert both(faults, "evaluation_in_between") is True


def test_every_row_is_trained_once_an_epoch_on_both_ranks(faults):
    result = both(faults, "ledger")
    for epoch in (result["seen"][:3], result["seen"][3:]):
        assert [len(window) for window in epoch] == [8, 8, 5]
        assert Counter(row for window in epoch for row in window) == Counter(
            f"train:{i}" for i in range(ROWS)
        )
    assert all(result["ranks"])


def test_both_ranks_end_early_after_the_same_update_and_resume_through_it_bit_for_bit(faults):
    found = both(faults, "early_stop_resumed_through")
    best = found["best"][0]
    assert found["codes"] == [0, 0, 0]
    assert found["counted_when_resumed"] == 1  # the stop came between the two bad evaluations
    assert found["best"] == [best, best] and best >= 4
    assert found["updates"] == [best + 8, best + 5, best + 8]
    assert found["stopped_by"] == "SIGTERM"  # rank 1 alone was asked, and both say it
    assert found["same_bits"] and found["same_files"]
    assert found["losses"] == [True, best // 4 + 3]  # the one before update 1 is the first
    assert found["result"] == [f"update_{best:06d}"] * 2
    assert f"ended early after update {best + 8}" in found["end"]
