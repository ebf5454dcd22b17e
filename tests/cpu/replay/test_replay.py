"""Any recorded update comes back bit for bit, what is not the run's is refused by name, and a
planted fault is found and judged."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from planted import spoiled_base
from replayed import as_object, command, rows_file, trained

from glassloop.replay.prose import conclusion
from glassloop.replay.reproduce import Compared, Reproduction, replayed
from glassloop.replay.start import open_scene

# Any recorded update


@pytest.mark.parametrize(
    ("update", "origin", "rerun"),
    [
        (7, "its capsule", 0),
        (3, "its capsule", 0),
        (8, "update_000004", 3),
        (9, "update_000008", 0),
        (4, "the beginning", 3),
        (1, "the beginning", 0),
    ],
)
def test_a_recorded_update_comes_back_bit_for_bit(whole, capsys, update, origin, rerun):
    found = as_object(capsys, whole, "--update", update)
    assert origin in found["origin"]
    assert found["reproduces"] and found["bit_for_bit"]
    assert [one["update"] for one in found["updates_rerun"]] == list(range(update - rerun, update))
    assert all(one["loss_off"] == one["norm_off"] == 0 for one in found["updates_rerun"])
    assert found["noise_floor"] == {"loss": 0, "grad_norm": 0, "gradient": 0}
    names = {one["name"] for one in found["compared"]}
    assert {"loss", "gradient norm"} < names
    assert sum(name.startswith("loss of train:") for name in names) in (2, 4)


def test_tokens_that_train_and_ranks_by_layer_come_back_too(tmp_path, tiny_qwen2, capsys):
    lora = {"trainable_token_indices": [17, 4], "rank_pattern": {"k_proj": 3}}
    run = trained(tmp_path, tiny_qwen2, lora=lora, schedule={"updates": 3, "warmup_updates": 1})
    found = as_object(capsys, run, "--update", 2)
    assert found["reproduces"] and found["bit_for_bit"]


def test_it_writes_nothing_into_the_run(whole, capsys):
    def listing() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    before = listing()
    assert command(capsys, whole, "--update", 6)[0] == 0
    assert listing() == before


def test_a_capsule_needs_neither_the_run_nor_its_data(whole, tmp_path, capsys):
    shutil.copytree(whole / "capsules" / "update_000007", tmp_path / "kept")
    data = whole.parent / "rows.jsonl"
    data.rename(tmp_path / "away")
    try:
        found = as_object(capsys, tmp_path / "kept")
    finally:
        (tmp_path / "away").rename(data)
    assert found["update"] == 7
    assert found["bit_for_bit"]


def test_an_update_is_rerun_where_its_capsule_is_damaged(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "capsules" / "update_000007" / "capsule.json").write_text("{}")
    found = as_object(capsys, run, "--update", 7)
    assert found["bit_for_bit"]
    assert "update_000004" in found["origin"]
    assert "capsule.json is corrupt" in found["notes"][0]


def test_damaged_checkpoints_are_passed_over(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "update_000008" / "optimizer.safetensors").write_bytes(b"")
    found = as_object(capsys, run, "--update", 9)
    assert "update_000004" in found["origin"]
    assert "optimizer.safetensors is corrupt" in found["notes"][0]
    assert found["bit_for_bit"]


def test_a_window_that_was_left_out_is_left_out_again_from_a_checkpoint_of_its_attempt(
    whole, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    again = [
        "--resume",
        str(run),
        "--at",
        "4",
        "--without-window",
        "6",
        "checkpoint.every_updates=null",
    ]
    from glassloop.config.arguments import parse
    from glassloop.loop.build import build_run
    from train_loop import train

    resumed = build_run(parse(again))
    assert train(resumed) == 0
    resumed.close_observers()
    shutil.rmtree(run / "capsules")
    assert (run / "checkpoints" / "update_000008").exists()
    found = as_object(capsys, run, "--update", 9)
    assert "update_000004" in found["origin"]
    assert [one["update"] for one in found["updates_rerun"]] == [5, 7, 8]
    assert found["bit_for_bit"]
    code, output = command(capsys, run, "--update", 6)
    assert code == 2
    assert "computed nothing" in output


def test_an_update_that_was_skipped_on_the_way_is_computed_and_skipped_again(
    tmp_path, tiny_llama, tiny_tokenizer, capsys
):
    (token,) = tiny_tokenizer.encode("~", add_special_tokens=False)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][token] = math.nan

    model = spoiled_base(tiny_llama, tmp_path / "model", spoil)
    rows_file(tmp_path / "rows.jsonl", 17)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "one ~", "completion": "two"}\n')
    run = trained(
        tmp_path,
        model,
        stability={"on_nonfinite": "skip"},
        record={"capsules": 0},
        execution={"preflight": False},
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (skipped, *_) = [line["update"] for line in lines if line["action"] == "skipped"]
    found = as_object(capsys, run, "--update", skipped + 1)
    assert found["bit_for_bit"]
    assert [one["update"] for one in found["updates_rerun"]][-1] == skipped
    assert as_object(capsys, run, "--update", skipped)["bit_for_bit"]  # NaN as it was


def test_another_number_on_record_is_not_reproduced(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[5]["grad_norm_pre_clip"] *= 1 + 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = command(capsys, run, "--update", 6)
    assert code == 1
    assert "verdict   not reproduced: gradient norm was" in output
    assert "off by 1.0e-06 where 0 is allowed" in " ".join(output.split())
    code, output = command(
        capsys, run, "--update", 8
    )  # its own numbers are right, and so are those of the state it starts from
    assert code == 0
    assert "update 6: " in output
    assert "off the record by 1.0e-06" in output


def test_a_number_within_a_few_noise_floors_reproduces(whole, monkeypatch):
    opened = open_scene(whole, 7, {})
    scene = replace(opened.scene, recorded={"loss": opened.scene.recorded["loss"] * (1 + 3e-7)})
    from glassloop.replay import reproduce as replay

    calls = iter([0.0, 1e-7])
    plain = replay.replayed

    def noisy(of):
        carried = plain(of)
        return replace(carried, loss_nats=carried.loss_nats * (1 + next(calls)))

    monkeypatch.setattr(replay, "replayed", noisy)
    done = replay.reproduce(scene)
    assert done.loss_floor == pytest.approx(1e-7, rel=1e-3)
    assert done.reproduces and not done.bit_for_bit
    calls = iter([0.0, 1e-7])
    further = replace(scene, recorded={"loss": opened.scene.recorded["loss"] * (1 + 3e-6)})
    assert replay.reproduce(further).reproduces is False


def test_the_verdict_names_a_number_that_does_not_reproduce_not_one_that_scatters_more(opened):
    scatters, parts = (
        Compared("loss", 1.0, 1.001, 1e-3, 1e-2),
        Compared("loss of row 7", 2.0, 2.00002, 1e-5, 0.0),
    )
    done = Reproduction(replayed(opened.scene), 0.0, 0.0, 0.0, (scatters, parts))
    assert conclusion(opened, done, None, None).startswith(
        "not reproduced: loss of row 7 was 2, is 2, off by 1.0e-05 where 0 is"
    )


def test_a_number_that_came_out_the_same_twice_by_luck_may_differ_in_its_last_bit(
    whole, monkeypatch
):
    """Where the gradients of two replays part, equal losses prove nothing about the last bit."""
    opened = open_scene(whole, 7, {})
    scene = replace(opened.scene, recorded={"loss": opened.scene.recorded["loss"] * (1 + 2.2e-7)})
    from glassloop.replay import reproduce as replay

    assert replay.reproduce(scene).reproduces is False  # bit for bit here: such a difference is one
    with monkeypatch.context() as patch:
        patch.setattr(replay, "relative_distance", lambda a, b: 1e-3)
        assert replay.reproduce(scene).reproduces is True
    plain, calls = replay.numbers, iter([0.0, 1e-9])

    def one_row_apart(of, carried):
        *others, (name, value) = plain(of, carried)
        return iter([*others, (name, value * (1 + next(calls, 0.0)))])

    monkeypatch.setattr(
        replay, "numbers", one_row_apart
    )  # a row's sum parts, gradients do not: the last bit of all is in doubt
    assert replay.reproduce(scene).reproduces is True
