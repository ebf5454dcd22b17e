"""Any recorded update comes back bit for bit, what is not the run's is refused by name, and a
planted fault is found and judged."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import continuations, planted_run, spoiled_base, sure_base

from glassloop.cli.__main__ import main
from glassloop.data.rows import Row
from glassloop.loop.run import Run
from glassloop.record.reading import leading_to
from glassloop.replay.bisect import Bisection, Part, bisect
from glassloop.replay.layers import LayerFinding
from glassloop.replay.matrices import MatrixStat, compare
from glassloop.replay.prose import conclusion
from glassloop.replay.reproduce import Compared, Reproduction, carry_out, enter, replayed
from glassloop.replay.start import Opened, open_scene
from glassloop.replay.trials import as_32_bit
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

WORDS = [
    "the",
    "caller",
    "asks",
    "for",
    "a",
    "code",
    "and",
    "receiver",
    "hangs",
    "up",
    "because",
    "nothing",
    "is",
    "checked",
]


def rows_file(path: Path, rows: int) -> Path:
    drawn = random.Random(5)
    lines = [
        {
            "prompt": " ".join(drawn.choices(WORDS, k=5)),
            "completion": " ".join(drawn.choices(WORDS, k=9)),
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def values_of(folder: Path, model: Path, **sections: dict) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": {"id": str(model), "quantization": "none"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"source": str(folder / "rows.jsonl"), "template": "chat", "max_tokens": 96},
        "batch": {"size": 2, "accumulation": 2},
        "schedule": {"updates": 9, "warmup_updates": 2},
        "optimizer": {"lr": 1e-2, "max_grad_norm": 0.5},
        "execution": {"precision": "fp32", "checkpointing": False},
        "evaluation": {"samples": 0},
        "checkpoint": {"every_updates": 4},
        "record": {"capture_updates": [7], "probe_every_updates": 2},
        "run": {"dir": str(folder), "name": "run"},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return values


def trained(folder: Path, model: Path, **sections: dict) -> Path:
    """A whole run through the training loop, on rows that lie in a file."""
    from glassloop.config.arguments import from_values
    from glassloop.loop.build import build_run
    from train_loop import train

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        rows_file(folder / "rows.jsonl", 18)
    run = build_run(from_values(values_of(folder, model, **sections)))
    assert train(run) == 0
    run.close_observers()
    return run.folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Nine updates with dropout and clipping; capsules of 3 (healthy) and 7 (asked), checkpoints
    after 4, 8 and 9."""
    return trained(tmp_path_factory.mktemp("whole"), tiny_llama)


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["replay", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.err + printed.out


def as_object(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    got, output = command(capsys, *words, "--json")
    assert got == code, output

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(output, parse_constant=refuse)


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
        ([whole, "--update", 7, "--bisekt"], "--bisekt is no option"),
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


# record.text


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return trained(
        tmp_path_factory.mktemp("silent"),
        tiny_llama,
        record={"text": "none", "capture_updates": [5]},
    )


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


# Parts of an update


@pytest.fixture(scope="module")
def opened(whole: Path) -> Opened:
    return open_scene(whole, 7, {})


def test_shares_of_passes_and_rows_add_up_to_the_gradient(whole, tmp_path_factory, tiny_llama):
    run = trained(
        tmp_path_factory.mktemp("dry"),
        tiny_llama,
        lora={"dropout": 0.0},
        schedule={"updates": 3, "warmup_updates": 1},
        record={"capture_updates": [3]},
    )
    scene = open_scene(run, 3, {}).scene
    replayed(scene)
    g = scene.parts.replica.adapters.grad.double().clone()
    for pieces in (
        [one for rank in scene.window.passes for one in rank],
        [(row,) for row in scene.window.rows],
    ):
        total = torch.zeros_like(g)
        for piece in pieces:
            window = replace(scene.window, rows=piece, passes=((piece,),))
            n, states = scene.supervised_tokens, scene.state.rng_states
            carry_out(enter(scene), scene.rows, window, n, states)
            total += scene.parts.replica.adapters.grad.double()
        assert ((total - g).norm() / g.norm()).item() < 1e-6


def test_losses_of_tokens_add_up_to_the_rows(opened):
    found = bisect(opened.scene, None)
    part = next(part for part in found.rows if part.name == found.token_row)
    total = sum(token.loss_nats for token in found.tokens)
    assert len(found.tokens) == part.supervised_tokens
    assert total / part.supervised_tokens == pytest.approx(
        part.loss_nats, rel=0.3
    )  # another draw of dropout
    row = opened.scene.rows[part.row]
    assert [row.input_ids[token.position] for token in found.tokens] == [
        token.token_id for token in found.tokens
    ]


def test_bisecting_leaves_the_scene_as_it_was(opened):
    before = replayed(opened.scene)
    told = []
    bisect(opened.scene, opened.healthy, lambda *one: told.append(one))
    rows = len(opened.scene.window.rows)
    assert [done for done, _, _ in told] == list(range(3 + rows))
    assert {total for _, total, _ in told} == {3 + rows}
    after = replayed(opened.scene)
    assert replace(before, rng_after=()) == replace(after, rng_after=())


def test_8_bit_moments_become_what_bitsandbytes_reads_in_them(opened):
    from bitsandbytes.functional import dequantize_blockwise

    tensors, plain = opened.scene.state.moments
    full, described = as_32_bit((tensors, plain))
    for moment, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        theirs = dequantize_blockwise(
            tensors[f"state{moment}"],
            absmax=tensors[f"absmax{moment}"],
            code=tensors[f"qmap{moment}"],
            blocksize=256,
        )
        assert torch.equal(full[name], theirs)
    assert float(full["step"]) == plain["values"]["step"] == 6
    assert described["optimizer"] == "AdamW"


def stat(
    layer: int, projection: str, weight: float, grad: float = 1.0, side: str = "A"
) -> MatrixStat:
    return MatrixStat(layer, projection, side, grad, weight, None, None)


def test_growth_of_all_matrices_is_no_departure_and_one_layer_of_two_cannot_hide():
    before = [stat(i, p, 1.0) for i in (0, 1) for p in ("q", "k")]
    grown = [stat(i, p, 30.0) for i in (0, 1) for p in ("q", "k")]
    assert {s.weight_factor for s in compare(grown, before)} == {1.0}
    one = [stat(i, p, 30.0 * (1000 if i else 1)) for i in (0, 1) for p in ("q", "k")]
    assert [s.weight_factor for s in compare(one, before)] == [1.0, 1.0, 1000.0, 1000.0]
    assert [s.weight_factor for s in compare(one, None)] == [1e-3, 1e-3, 1000.0, 1000.0]


def test_the_records_of_a_trajectory_are_those_that_led_to_the_update():
    first = [{"update": u, "attempt": 1} for u in range(1, 8)]
    second = [{"update": u, "attempt": 2} for u in range(4, 7)]  # resumed after 3, ended at 6
    lines = first + second
    assert [record["attempt"] for record in leading_to(lines, 7).values()] == [1] * 7
    assert [record["attempt"] for record in leading_to(lines, 6).values()] == [1, 1, 1, 2, 2, 2]
    assert leading_to(lines, 8) == {}


# Planted faults


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return sure_base(tiny_llama, tmp_path_factory.mktemp("sure") / "model")


@pytest.fixture(scope="module")
def sound(sure: Path) -> tuple[Row, ...]:
    return continuations(sure)


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
