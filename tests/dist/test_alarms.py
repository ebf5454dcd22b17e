"""An unusual update on one of two ranks: both ranks see it and react alike.

The update is kept, with the command that replays it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import HERE, launch, write_rows


@pytest.fixture(scope="module")
def alarms(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict:
    folder = tmp_path_factory.mktemp("alarms")
    launch(
        HERE / "alarms.py", str(folder), str(tiny_llama), str(write_rows(folder / "rows.jsonl", 21))
    )
    return json.loads((folder / "alarms.json").read_text())


def both(alarms: dict, check: str):
    first, second = alarms[check]
    assert first == second
    return first


def test_a_row_of_50_times_its_loss_on_rank_1_is_an_alarm_and_the_reaction_is_taken_by_both(alarms):
    results = both(alarms, "spikes")
    for result in results.values():
        assert set(result["alarms"]) == {"norm_spike", "loss_spike"}
        assert "update_000014" in result["capsules"]
        kinds = {kind: command for kind, _, command in result["events"]}
        assert kinds["alarm"].startswith("glassloop replay ")
        assert kinds["alarm"].endswith("--update 14 --bisect")
        assert "capsule" in kinds
    warn, clip, skip, stop = (results[name] for name in ("warn", "clip", "skip", "stop"))
    assert (warn["action"], warn["ends"], warn["unchanged"]) == ("applied", False, False)
    assert warn["clip"] == pytest.approx(1.0 / warn["norm"])
    assert (clip["action"], clip["unchanged"]) == ("applied", False)
    assert clip["clip"] * clip["norm"] < 0.9 < warn["norm"]
    assert any(kind == "clipped" for kind, _, _ in clip["events"])
    assert (skip["action"], skip["ends"], skip["unchanged"]) == ("skipped", False, True)
    assert any(kind == "skipped" for kind, _, _ in skip["events"])
    assert (stop["action"], stop["ends"], stop["unchanged"]) == ("skipped", True, True)


def test_a_replica_nudged_in_one_entry_stops_the_run_and_is_named_with_both_values(alarms):
    result = both(alarms, "replica_nudged")
    held = ", ".join(f"rank {rank}: {value:.9g}" for rank, value in enumerate(result["held"]))
    assert (
        f"no longer equal before update 3: {result['name']}, entry 5 is the first ({held})"
        in result["error"]
    )


def test_one_bit_of_an_optimizer_state_stops_the_run_and_is_named(alarms):
    result = both(alarms, "moment_nudged")
    assert f"state2 of {result['name']}, entry 7 is the first" in result["error"]


def test_replicas_that_part_in_the_last_step_are_not_saved(alarms):
    result = both(alarms, "nudged_before_the_end")
    assert "no longer equal after update 1" in result["error"]
    assert result["saved"] is False


def test_an_adapter_that_is_not_finite_is_named(alarms):
    result = both(alarms, "adapters_not_finite")
    assert (result["action"], result["nonfinite"]) == ("skipped", True)
    assert (
        result["reason"]
        == "adapters are not finite before the update: layers.0.self_attn.q_proj.A is the first"
    )


def test_an_update_that_is_not_finite_is_kept_whole_with_the_random_numbers_of_all_ranks(alarms):
    result = both(alarms, "nonfinite_is_kept_whole")
    assert (result["why"], result["ranks"]) == ("nonfinite", 2)
    assert {
        "adapter_before.safetensors",
        "optimizer.safetensors",
        "rng_rank0.json",
        "rng_rank1.json",
    } <= set(result["files"])


def test_updates_are_captured_by_number_by_a_signal_to_one_rank_and_once_as_healthy(alarms):
    assert both(alarms, "captured_by_number_and_by_signal") == [
        "update_000002",
        "update_000003",
        "update_000004",
    ]


def test_probes_and_capsules_change_no_bit(alarms):
    result = both(alarms, "probes_change_nothing")
    assert result["equal"] is True
    assert [probe["update"] for probe in result["probes"]] == [1, 2, 3, 4]


def test_at_update_1_the_gradient_of_A_is_0_and_B_has_no_ratio(alarms):
    first, second = both(alarms, "probes_change_nothing")["probes"][:2]
    for name, grad, ratio, moved in zip(
        first["matrices"],
        first["grad_norm"],
        first["update_to_weight"],
        first["unmoved_share"],
        strict=True,
    ):
        if name.endswith(".A"):
            assert grad == 0.0
        else:
            assert grad > 0
            assert ratio is None
            assert moved < 0.5
    assert all(ratio is not None for ratio in second["update_to_weight"])


def test_the_noise_scale_comes_from_ranks_and_is_unknown_under_ddp(alarms):
    result = both(alarms, "noise_scale")
    assert all(value is None or value > 0 for value in result["explicit"])
    assert any(value is not None for value in result["explicit"])
    assert result["ddp"] is None


def test_going_back_repeats_the_run_bit_for_bit_and_without_a_window_only_that_one_is_left_out(
    alarms,
):
    result = both(alarms, "gone_back")
    assert (result["code"], result["same_code"], result["without_code"]) == (0, 0, 0)
    assert result["same"] is True
    assert result["without"] is False
    assert [(update, action) for update, action, _, _ in result["last"]] == [
        (3, "applied"),
        (4, "skipped"),
        (5, "applied"),
        (6, "applied"),
    ]
    assert [lr for _, _, _, lr in result["last"]] == result["lr"][2:]
    assert result["last"][1][2] == "its window was left out on demand (resume.without_windows)"
    assert result["left_out"] == [4]  # so that a further resume leaves it out too


def test_going_back_to_where_no_checkpoint_is_names_those_that_there_are(alarms):
    first, second = both(alarms, "going_back_is_refused")
    assert "resume.at = 3" in first
    assert "there are 0, 2, 4, 6" in first
    assert "resume.at = 999" in second
