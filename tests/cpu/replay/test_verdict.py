"""A planted fault is named by the verdict; a healthy update has none."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import continuations, planted_run, spoiled_base
from replayed import as_object, command

from glassloop.loop.run import Run
from glassloop.replay.bisect import Bisection, Part
from glassloop.replay.layers import LayerFinding
from glassloop.replay.reproduce import carry_out
from glassloop.replay.verdict import (
    ADAMW,
    AS_IT_WAS,
    EAGER,
    FP32,
    FRESH_ADAMW,
    HALF_LR,
    PEFT,
    WITHOUT_ROW,
    Trial,
    judge,
)
from train_loop import update_once


def judged(
    capsys: pytest.CaptureFixture[str], run: Path, update: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    found = as_object(capsys, run, "--update", update, "--bisect", "--try")
    assert found["bit_for_bit"]
    return found, found["bisection"], found["trials"]["verdict"]


def test_a_healthy_update_has_no_suspect(sure, sound, tmp_path, capsys):
    found, walk, verdict = judged(capsys, planted_run(tmp_path, sure, sound), 4)
    assert walk["row"] is walk["layer"] is None
    assert verdict["kind"] == "unresolved"
    assert "nothing is out of the usual range" in verdict["why"]
    assert found["next"] == "glassloop verify"


def test_a_row_that_costs_50_times_the_others_is_named_and_the_verdict_is_data(
    sure, sound, tmp_path, capsys
):
    (bad,) = continuations(sure, worst=True, rows=1, start=100)

    def spoil(run: Run) -> None:
        run.batches = replace(run.batches, rows=(*run.batches.rows[:5], bad, *run.batches.rows[6:]))

    run = planted_run(tmp_path, sure, sound, spoil)
    found, walk, verdict = judged(capsys, run, 4)
    assert walk["row"]["name"] == walk["token_row"] == "row:bad"
    assert walk["row"]["loss_factor"] > 50
    assert walk["one_pass"]["index"] == walk["row"]["index"]
    assert verdict["kind"] == "data"
    assert "without row:bad" in verdict["why"]
    assert found["next"].endswith(f"--resume {run} --at 0 --without-window 4")


def scale_layer_1(run: Run) -> None:
    for name, place in run.replica.adapters.slices.items():
        if "layers.1." in name:
            place.of(run.replica.adapters.flat.data).mul_(1000)


@pytest.mark.parametrize("healthy", [True, False])
def test_a_layer_scaled_1000_times_is_named_with_and_without_a_healthy_capsule(
    sure, sound, tmp_path, capsys, healthy
):
    run = planted_run(tmp_path, sure, sound, scale_layer_1)
    if not healthy:
        shutil.rmtree(run / "capsules" / "update_000002")
    found, walk, verdict = judged(capsys, run, 4)
    assert (walk["layer"]["kind"], walk["layer"]["layer"]) == ("weight", 1)
    assert "all projections" in walk["layer"]["message"]
    assert verdict["kind"] == "unresolved"
    assert "the state that it started from was off already" in verdict["why"]
    assert found["next"] == f"glassloop replay {run} --update 3 --bisect --try"


def test_a_frozen_projection_scaled_1000_times_is_named_by_its_output(
    sure, sound, tmp_path, capsys
):
    def scale(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.self_attn.v_proj.weight"] *= 1000

    run = planted_run(tmp_path, spoiled_base(sure, tmp_path / "model", scale), sound)
    shutil.rmtree(run / "capsules" / "update_000002")  # it has the fault too
    _, walk, _ = judged(capsys, run, 4)
    assert (walk["layer"]["kind"], walk["layer"]["name"]) == ("output", "layers.1.self_attn.v_proj")


def test_an_infinite_activation_is_named_by_its_module_and_no_row_is_blamed(
    sure, sound, tmp_path, capsys
):
    def overflow(run: Run) -> None:
        for name, place in run.replica.adapters.slices.items():
            if "layers.1.mlp.up_proj" in name:
                place.of(run.replica.adapters.flat.data).fill_(1e30)

    _, walk, verdict = judged(capsys, planted_run(tmp_path, sure, sound, overflow), 4)
    assert walk["everything"]
    assert walk["row"] is None
    assert walk["layer"]["name"] == "layers.1.mlp.up_proj.lora_B.default"
    assert verdict["kind"] == "unresolved"
    assert "every row is affected" in verdict["why"]


def test_a_token_whose_embedding_is_nan_is_found_at_its_place_and_the_verdict_is_data(
    sure, sound, tmp_path, capsys
):
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][511] = math.nan

    row = sound[6]
    assert all(511 not in one.input_ids for one in sound)
    bad = replace(row, input_ids=(*row.input_ids[:10], 511, *row.input_ids[11:]))

    def plant(run: Run) -> None:
        run.batches = replace(run.batches, rows=(*sound[:6], bad, sound[7]))

    model = spoiled_base(sure, tmp_path / "model", spoil)
    _, walk, verdict = judged(capsys, planted_run(tmp_path, model, sound, plant), 4)
    assert walk["row"]["name"] == "row:6"
    assert (
        walk["layer"]["message"]
        == "embed_tokens is the first module whose output is not finite, first at place 10"
    )
    assert verdict["kind"] == "data"


def test_a_fault_outside_of_rows_and_state_does_not_reproduce(sure, sound, tmp_path, capsys):
    def spoil(run: Run) -> None:
        engine = run.replica.engine
        run.replica.engine = lambda p: tuple(value * math.nan for value in engine(p))

    run = planted_run(tmp_path, sure, sound, spoil)
    code, output = command(capsys, run, "--update", 4, "--bisect", "--try")
    assert code == 1
    assert "not reproduced: loss was nan, is 0.1278" in output
    assert "look at hardware, kernels and threads" in " ".join(output.split())


def test_a_step_that_is_too_long_is_the_lrs_doing(sure, sound, tmp_path, capsys):
    run = planted_run(
        tmp_path,
        sure,
        sound,
        updates=5,
        optimizer={"lr": 1e-2},
        schedule={"updates": 30, "warmup_updates": 5},
    )
    found, _, verdict = judged(capsys, run, 5)
    assert verdict["kind"] == "lr"
    assert found["next"].endswith("optimizer.lr=0.005")


def test_moments_that_are_off_are_the_optimizers_doing(sure, sound, tmp_path, capsys):
    def spoil(run: Run) -> None:
        run.replica.optimizer.state[run.replica.adapters.flat]["absmax1"].mul_(1e4)

    _, _, verdict = judged(capsys, planted_run(tmp_path, sure, sound, spoil), 4)
    assert verdict["kind"] == "optimizer"
    assert "fresh moments" in verdict["why"]


# The verdict's rules


def part(name: str, loss: float, norm: float, index: int) -> Part:
    return Part(name, 0, 0, index, 10, loss, norm)


def walked(
    *, row: bool = False, everything: bool = False, layer: LayerFinding | None = None
) -> Bisection:
    rows = (part("train:1", 1.0, 1.0, 0), part("train:2", 50.0 if row else 1.0, 9.0, 1))
    return Bisection(
        (), (), rows, None, None, rows[1] if row else None, everything, None, "", (), layer, "", ()
    )


GOOD, BAD, NAN = (1.0, 1.0), (9.0, 40.0), (math.nan, math.nan)


def tried(
    base: tuple[float, float], after: float | None = None, **others: tuple[float, float] | float
) -> dict[str, Trial]:
    """Trials that are like `base` but for those given; a float is a loss after the step."""
    names = (AS_IT_WAS, WITHOUT_ROW, HALF_LR, ADAMW, FRESH_ADAMW, FP32, EAGER, PEFT)
    keys = dict(
        zip(("base", "row", "half", "adamw", "fresh", "fp32", "eager", "peft"), names, strict=True)
    )
    trials = {
        name: Trial(name, *base, clip_coef=1.0, change=1.0, loss_after_nats=after) for name in names
    }
    for key, given in others.items():
        name = keys[key]
        change = (
            {"loss_after_nats": given}
            if isinstance(given, float)
            else {"loss_nats": given[0], "grad_norm": given[1]}
        )
        trials[name] = replace(trials[name], **change)
    return trials


RULES = {
    "fp32 cures": (tried(NAN, fp32=GOOD), walked(), "precision"),
    "fp32 cures, and so does leaving a row out": (
        tried(NAN, fp32=GOOD, row=GOOD),
        walked(row=True),
        "precision",
    ),
    "eager attention cures": (tried(NAN, eager=GOOD), walked(), "engine"),
    "the reference engine cures": (tried(BAD, peft=GOOD), walked(), "engine"),
    "leaving the row out cures": (tried(BAD, row=GOOD), walked(row=True), "data"),
    "leaving a row out cures, but it does not stand out": (
        tried(BAD, row=GOOD),
        walked(),
        "unresolved",
    ),
    "leaving the row out is not enough": (
        tried(BAD, row=(2.0, 20.0)),
        walked(row=True),
        "unresolved",
    ),
    "nothing cures": (tried(BAD), walked(), "unresolved"),
    "every row": (tried(NAN, row=NAN), walked(everything=True), "unresolved"),
    "32-bit AdamW does no harm": (tried(GOOD, 9.0, adamw=0.9), walked(), "optimizer"),
    "fresh moments do no harm": (tried(GOOD, 9.0, fresh=0.9, half=5.0), walked(), "optimizer"),
    "half the lr does half the harm": (tried(GOOD, 3.0, half=1.5), walked(), "lr"),
    "half the lr does as much": (tried(GOOD, 3.0, half=2.9), walked(), "unresolved"),
    "a step ends in NaN, half of it does not": (tried(GOOD, math.nan, half=1.0), walked(), "lr"),
    "a healthy step": (tried(GOOD, 0.9), walked(), "unresolved"),
}


@pytest.mark.parametrize(("trials", "found", "kind"), RULES.values(), ids=RULES)
def test_the_verdict_follows_from_the_rules(trials, found, kind):
    assert judge(trials, found, (1.0, 1.0), 0.0).kind == kind


def test_without_usual_numbers_only_what_is_not_finite_or_stands_out_is_judged():
    assert judge(tried(BAD, 8.0, row=GOOD), walked(row=True), None, 0.0).kind == "data"
    assert judge(tried(NAN, fp32=GOOD), walked(), None, 0.0).kind == "precision"
    assert judge(tried(BAD, 8.0), walked(), None, 0.0).kind == "unresolved"


def test_a_rise_within_the_noise_is_no_harm():
    assert judge(tried(GOOD, 1.3, half=1.0), walked(), (1.0, 1.0), 0.0).kind == "lr"
    assert judge(tried(GOOD, 1.3, half=1.0), walked(), (1.0, 1.0), 0.1).kind == "unresolved"


def test_the_loop_and_the_replay_run_the_same_passes(whole):
    """The replay has no passes of its own: it calls the loop's."""
    import train_loop

    source = Path(carry_out.__code__.co_filename).read_text()
    assert "from train_loop import run_passes" in source
    assert update_once.__globals__["run_passes"] is train_loop.run_passes
