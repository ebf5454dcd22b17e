"""The benchmark: drawn weights, FLOPs, cards, matrix, checks, tables."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glassloop.base import random as random_base
from glassloop.base.hashing import base_hash
from glassloop.base.quantised import load_base
from glassloop.base.source import resolve_source
from glassloop.base.tokenizer import load_tokenizer
from glassloop.bench import card, machine, results, table
from glassloop.bench.arm import build
from glassloop.bench.matrix import run_matrix, schedule, specs_of, unable
from glassloop.bench.processes import Place, Start, command, environment, run_arm, run_together
from glassloop.bench.spec import Spec, read_spec
from glassloop.bench.sums import Tokens, digest_of, energy_of, spread, utilisation
from glassloop.bench.workloads import workload
from glassloop.cli import bench as bench_command
from glassloop.config.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.build import build_engine
from glassloop.predict.flops import flops_of
from glassloop.predict.shapes import KNOWN

CPU = torch.device("cpu")
EXPECTED_WEIGHTS = [
    -0.01513671875,
    0.28515625,
    0.058349609375,
    -0.042236328125,
]  # the first of "0.q_proj", hidden 64: on any device
TINY = KNOWN["random:tiny"]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(model: str, cache_dir: Path, *, precision: str = "bf16", **fields: object):
    config = ModelConfig(id=model, cache_dir=str(cache_dir), **fields)  # type: ignore[arg-type]
    return load_base(config, precision=precision, device=CPU, first=contextlib.nullcontext)


# --- models with drawn weights


def test_drawn_nf4_base_is_what_transformers_makes_of_the_same_weights(tmp_path: Path) -> None:
    drawn, report = load("random:tiny", tmp_path)
    plain, _ = load("random:tiny", tmp_path, quantization="none")
    plain.save_pretrained(tmp_path / "files")
    _, read = load(str(tmp_path / "files"), tmp_path)
    assert report.checksum == read.checksum
    assert type(drawn.model.layers[1].mlp.down_proj).__name__ == "Linear4bit"
    _, second = load("random:tiny", tmp_path)
    assert second.from_cache and second.checksum == report.checksum


def test_drawn_weights_are_the_same_bits_everywhere_and_about_normal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_base.drawn("0.q_proj", (256, 64), 64, CPU)
    assert weight.flatten()[:4].tolist() == EXPECTED_WEIGHTS
    assert weight.dtype == torch.bfloat16
    assert weight.float().std().item() == pytest.approx(0.16, rel=0.02)
    assert abs(weight.float().mean().item()) < 0.005
    monkeypatch.setattr(random_base, "CHUNK", 100)
    assert torch.equal(random_base.drawn("0.q_proj", (256, 64), 64, CPU), weight)
    other = random_base.drawn("1.q_proj", (256, 64), 64, CPU)
    assert (
        abs(torch.corrcoef(torch.stack([weight.flatten(), other.flatten()]).float())[0, 1].item())
        < 0.03
    )


def test_drawn_base_is_known_by_name_and_has_a_tokenizer_of_its_vocabulary(tmp_path: Path) -> None:
    config = ModelConfig(id="random:tiny", cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(config)
    assert len(tokenizer) == TINY.vocabulary
    assert tokenizer.decode(tokenizer.encode("Grüße, 12 §")) == "Grüße, 12 §"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    source = resolve_source(config)
    assert base_hash(source, tmp_path / "memo") == base_hash(
        replace(source, folder=None), tmp_path / "memo"
    )
    assert "drawn" in source.note
    with pytest.raises(
        ValueError, match=r"random:llama-9b is unknown: there are random:llama-8b, random:llama-70b"
    ):
        resolve_source(ModelConfig(id="random:llama-9b", cache_dir=str(tmp_path)))


# --- FLOPs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [SEVEN, ("down_proj",), ("k_proj", "down_proj")])
def test_flops_are_those_that_torch_counts(
    tmp_path: Path, checkpointing: bool, targets: tuple[str, ...]
) -> None:
    # eager attention: torch counts no other on a CPU. It computes all places of a row.
    model = ModelConfig(
        id="random:tiny", quantization="none", attention="eager", cache_dir=str(tmp_path)
    )
    engine = build_engine(
        model,
        LoraConfig(r=4, alpha=8, targets=targets),
        precision="fp32",
        checkpointing=checkpointing,
        seed=0,
        device=CPU,
        first=contextlib.nullcontext,
    )
    rows = [Row(str(i), tuple(range(10, 74)), (False,) * 20 + (True,) * 44) for i in range(2)]
    p = build_pass(rows, packed=False, pad_id=3, device=CPU)
    with FlopCounterMode(display=False) as counter:
        engine(p)[0].backward()
    counted = flops_of(
        TINY, [(64, 44)] * 2, r=4, targets=targets, checkpointing=checkpointing, causal=False
    )
    assert counted.model + counted.recompute == pytest.approx(counter.get_total_flops(), rel=0.01)
    if not checkpointing:
        assert counted.model == counter.get_total_flops() and counted.recompute == 0


def test_flops_of_the_8b_shape_are_the_ones_done_by_hand() -> None:
    per_token = flops_of(
        KNOWN["random:llama-8b"], [(2048, 2048)], r=16, targets=SEVEN, checkpointing=True
    )
    # 4 x 6.98 G weights, less 0.05 of the first layer; 4 x 0.525 G of the head; 6 x 42 M of
    # adapters
    assert per_token.linear / 2048 / 1e9 == pytest.approx(4 * 6.9793 - 0.0503, rel=1e-3)
    assert per_token.head / 2048 / 1e9 == pytest.approx(2.101, rel=1e-3)
    assert per_token.adapters / 2048 / 1e9 == pytest.approx(6 * 0.041943, rel=1e-2)
    assert per_token.attention / 2048 / 1e9 == pytest.approx(
        3 * 32 * 4 * 1024.5 * 4096 / 1e9, rel=1e-6
    )
    half = flops_of(
        KNOWN["random:llama-8b"], [(2048, 1024)], r=16, targets=SEVEN, checkpointing=False
    )
    assert half.head == per_token.head / 2 and half.linear == per_token.linear


# --- sums


def test_rates_and_spread_say_of_what() -> None:
    assert Tokens(100, 80, 120).per_s(2.0) == {"real": 50.0, "supervised": 40.0, "slot": 60.0}
    assert Tokens(100, 80, 120).per_s(2.0, 2)["real"] == 25.0
    assert spread([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "p10": 1.2,
        "p90": 2.8,
        "all": [3.0, 1.0, 2.0],
    }
    assert spread([3.0])["p90"] == 3.0


def test_utilisation_tells_needed_from_executed() -> None:
    rows = workload("scam-v1", 4, vocabulary=512)
    how: dict[str, Any] = dict(r=4, targets=SEVEN, checkpointing=True, seconds=2.0, ceiling=1e9)
    literal = utilisation(TINY, [rows[:2], rows[2:]], packed=False, ranks=1, **how)
    packed = utilisation(TINY, [rows], packed=True, ranks=1, **how)
    assert literal["mfu"] == packed["mfu"] and literal["hfu"] > packed["hfu"] > packed["mfu"]
    assert utilisation(TINY, [rows], packed=True, ranks=2, **how)["mfu"] == pytest.approx(
        packed["mfu"] / 2
    )
    assert utilisation(TINY, [rows], packed=True, ranks=1, **how | {"ceiling": None})["mfu"] is None


def test_energy_is_the_counters_else_the_mean_power_else_nothing() -> None:
    assert energy_of([100.0, 200.0], None, 2.0, 600) == {
        "joules": 300.0,
        "how": "NVML's energy counter",
        "tokens_per_joule": 2.0,
    }
    told = energy_of([None, None], {"power_w": 50.0}, 2.0, 600)
    assert told is not None and told["joules"] == 200.0 and "mean power" in told["how"]
    assert energy_of([None], None, 2.0, 600) is None
    assert energy_of([None], {"power_w": None}, 2.0, 600) is None


# --- what a card says of itself

SMI = """#!/bin/sh
case "$*" in
  *throttle*lms*|*event*lms*) for i in 1 2 3; do echo "1700, 9501, 300.50, 61, 0x0000000000000004"; done
    echo "1500, 9501, 340.50, 63, 0x0000000000000024"; echo "1700, 95"; exec sleep 5;;
  *event_reasons*) echo "Field is not a valid field to query" >&2; exit 2;;
  *throttle_reasons*) echo "0x0000000000000024";;
  *clocks.sm,clocks.mem*) echo "1700, 9501, 300.5, 61";;
  *driver_version*) echo "NVIDIA GeForce RTX 3090, 570.10, 350.00, [N/A], 1695, 2100, 9501, 60, 4, 4, 8";;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-smi of an older driver."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("smi")
def test_card_state_has_units_and_names_its_throttling() -> None:
    state = machine.card_state("GPU-1")
    assert state is not None
    assert state["card"] == "NVIDIA GeForce RTX 3090" and state["driver"] == "570.10"
    assert (state["power_limit_w"], state["power_w"], state["sm_mhz"], state["pcie_width"]) == (
        350.0,
        None,
        1695,
        8,
    )
    assert state["throttle"] == ["power cap", "thermal, software"]


@pytest.mark.usefixtures("smi")
def test_sampler_sums_up_what_was_seen_under_load() -> None:
    sampler = machine.Sampler("GPU-1")
    assert sampler._process is not None and sampler._process.stdout is not None
    time.sleep(0.5)
    seen = machine.summed_up(sampler.stop())
    assert seen is not None and seen["samples"] == 4  # the cut-off line is not one
    assert (seen["sm_mhz"], seen["sm_mhz_lowest"], seen["power_w"]) == (1700, 1500, 310.5)
    assert seen["throttle"] == ["power cap", "thermal, software"]


def test_a_machine_without_a_card_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.card_state(None) is None
    assert machine.summed_up(machine.Sampler(None).stop()) is None
    assert machine.energy_j(None) is None
    assert machine.reasons_of("0x0") == [] and machine.reasons_of("0x8000") == ["0x8000"]


# --- the matrix


def specs(**changes: Any) -> list[Spec]:
    asked: dict[str, Any] = dict(
        engines=["peft"],
        workloads=["scam-v1", "full-v1"],
        layouts=["literal", "packed"],
        ranks=[1, 2],
        batches=[2],
        checkpointing=[True],
    )
    common = dict(rows_per_update=8, model="random:tiny", precision="fp32", updates=2, warmup=1)
    return specs_of(**{**asked, **changes}, place=Place("cpu", 0), common=common)


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
clock = Clock(spec, Path.cwd(), uuid=None, first_rank=True, wait=lambda: None, rest=lambda: said("rest"), wake=lambda: said("wake"))
for u in range(1, spec.total_updates + 1):
    clock.begin(u)
    said(f"begin {u}")
    if u == 4 and how == "dies":
        sys.exit("no more memory")
    time.sleep(60 if u == 4 and how == "hangs" else 0.02)
    said(f"end {u}")
    clock.end(u)
Path(spec.out).write_text(json.dumps(spec.about | {"turns_s": clock.turns_s, "kept": clock.measured_update_s, "left": clock.warmup_update_s}))
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
    for line in lines:
        assert (len(line["turns_s"]), len(line["kept"]), len(line["left"])) == (3, 6, 3)
        assert all(
            0.04 <= seconds < 1 for seconds in line["turns_s"]
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


def test_an_arm_that_cannot_run_leaves_a_line_that_says_why(tmp_path: Path) -> None:
    spec = Spec("peft", "scam-v1", "literal", 1, 3, 8, "random:tiny", "fp32", device="cpu")
    line = run_arm(spec, Place("cpu", 0), tmp_path / "arm", timeout_s=120)
    assert (
        "batch.rows_per_update = 8 is not a multiple" in line["failed"]
        and line["cell"]["batch"] == 3
    )
    slow = run_arm(spec, Place("cpu", 0), tmp_path / "slow", timeout_s=0.2)
    assert "took longer than 0.2 s" in slow["failed"]


# --- checks, tables, comparisons


def line(
    speed: float = 1000.0,
    *,
    loss: float = 7.0,
    norm: float = 0.5,
    gpus: int = 2,
    repeat: int = 0,
    **cell: Any,
) -> dict[str, Any]:
    spec = Spec("peft", "scam-v1", "literal", 1, 2, 8, "random:tiny", "bf16", repeat=repeat)
    spec = replace(spec, **cell)
    return {
        "schema": 1,
        "kind": "bench",
        "name": spec.name,
        "repeat": repeat,
        "cell": spec.cell,
        "rows_digest": f"{spec.workload}{spec.rows_per_update}",
        "tokens_per_s": {"real": speed},
        "tokens_per_s_per_rank": {"real": speed / spec.ranks},
        "update_s": {"median": 1.0, "p10": 0.9, "p90": 1.1},
        "peak": {"allocated_gib": 7.5},
        "flops": {"mfu": 0.25},
        "update_1": {"loss_nats": loss, "grad_norm": norm},
        "card": {"before": None, "during": None, "after": None, "p2p": None},
        "machine": {
            "gpus": [{"name": "NVIDIA GeForce RTX 3090", "memory_gib": 23.7}] * gpus,
            "git": {"commit": "0123456789abcdef", "changed": False},
            "packages": {"torch": "2.11.0"},
            "driver": "570.10",
            "cuda": "13.0",
            "glassloop": "0.1.0",
        },
    }


def judged(*lines: dict[str, Any]) -> list[dict[str, Any]]:
    return [one | {"check": results.checked(one, lines)} for one in lines]


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        (dict(loss=7.01, norm=0.52), True),
        (dict(loss=7.02), False),
        (dict(norm=0.53), False),
        (dict(loss=float("nan")), False),
        (dict(norm=None), False),
        (dict(precision="fp32"), None),
        (dict(workload="full-v1"), None),
        (dict(rows_per_update=16), None),
        (dict(model="smollm2"), None),
    ],
)
def test_a_row_is_held_to_the_reference_on_the_same_rows(
    changes: dict[str, Any], within: bool | None
) -> None:
    one = line(layout="packed", **changes)
    assert results.checked(one, [line(), one])["within"] is within
    shown = "\n".join(
        table.table(judged(line(speed=111.0), one | {"tokens_per_s": {"real": 98765.0}}))
    )
    assert ("98,765" in shown) is bool(within)
    assert ("CHECK FAILED" in shown) is (within is False)
    assert ("not shown" in shown) is (not within)


def test_fp32_is_held_to_more() -> None:
    reference = line(precision="fp32")
    assert results.checked(line(precision="fp32", layout="packed", loss=7.00005), [reference])[
        "within"
    ]
    assert not results.checked(line(precision="fp32", layout="packed", loss=7.0005), [reference])[
        "within"
    ]


def test_table_is_narrow_and_repeats_are_one_row() -> None:
    lines = judged(
        line(1000.0),
        line(1100.0, repeat=1),
        line(1234567.0, layout="packed", ranks=2),
        {**line(), "failed": "x" * 50},
    )
    shown = table.table(lines)
    assert max(len(row) for row in shown[:3]) <= 100
    assert "1,050" in shown[1] and shown[1].endswith("2")
    assert any(row.startswith("failed: peft, scam-v1") for row in shown)


def test_scaling_is_told_and_doubted_above_100_percent() -> None:
    good = "\n".join(table.table(judged(line(1000.0), line(1900.0, ranks=2))))
    assert "2 ranks reach 95% of 2 x one rank" in good and "ABOVE" not in good
    assert "ABOVE 100 %" in "\n".join(table.table(judged(line(1000.0), line(2100.0, ranks=2))))
    assert "share 1 GPU: a check" in "\n".join(
        table.table(judged(line(1000.0, gpus=1), line(1900.0, ranks=2, gpus=1)))
    )


def test_the_same_arms_are_compared() -> None:
    lines, whole = table.compare(judged(line(1000.0)), judged(line(1250.0)), anyway=False)
    assert whole and "1.250" in lines[1] and "the same" in lines[1]
    lines, whole = table.compare(
        judged(line(1000.0)), judged(line(), line(1500.0, layout="packed"))[1:], anyway=False
    )
    assert whole and "1.500" in lines[1] and "peft literal" in lines[1]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(rows_per_update=16), "rows_per_update: 8 in A, 16 in B"),
        (dict(workload="full-v1"), "workload: scam-v1 in A, full-v1 in B"),
        (dict(precision="fp32"), "precision: bf16 in A, fp32 in B"),
        (dict(checkpointing=False), "checkpointing: True in A, False in B"),
    ],
)
def test_other_work_is_not_compared_unless_asked(changes: dict[str, Any], told: str) -> None:
    a, b = judged(line(1000.0)), judged(line(3000.0, **changes))
    lines, whole = table.compare(a, b, anyway=False)
    assert not whole and told in lines[1] and "3.000" not in "\n".join(lines)
    lines, whole = table.compare(a, b, anyway=True)
    assert (
        not whole and "3.000" in lines[1] and "NOT THE SAME WORK" in lines[2] and told in lines[2]
    )


def test_files_are_read_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, speed in (("a", 1000.0), ("b", 500.0)):
        results.append(tmp_path / name, judged(line(speed))[0])
    assert bench_command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "0.500" in out and "#" * 48 in out and "#" * 24 in out
    (tmp_path / "c").write_text('{"kind": "cell"}\n')
    with pytest.raises(ValueError, match="holds no line of glassloop bench"):
        results.read(tmp_path / "c")
    (tmp_path / "c").write_text(json.dumps(line() | {"schema": 2}))
    with pytest.raises(ValueError, match="has schema 2, this glassloop reads up to 1"):
        results.read(tmp_path / "c")
    (tmp_path / "c").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        results.read(tmp_path / "c")


def test_another_card_commit_or_library_is_another_row() -> None:
    other = line(2000.0)
    other["machine"] = {**other["machine"], "packages": {"torch": "2.13.0"}}
    assert len(results.arms(judged(line(1000.0), other))) == 2


# --- a card in one line


def test_card_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="--card measures a GPU, and torch sees none here"):
        card.card_spec(Place("cpu", 0), 1)
    with pytest.raises(ValueError, match="torch sees 1 GPU here"):
        card.card_spec(Place("cuda", 1), 2)
    assert card.card_spec(Place("cuda", 2), 2).rows_per_update == 16


def test_the_card_line_says_on_what_and_how_fast() -> None:
    one = line(2000.0, ranks=2, workload="full-v1")
    state = {
        "power_limit_w": 350.0,
        "pcie_generation": 4,
        "pcie_generation_max": 4,
        "pcie_width": 8,
    }
    during = {"sm_mhz": 1695, "sm_mhz_lowest": 1500, "memory_mhz": 9501, "throttle": ["power cap"]}
    one["card"] = {"before": state, "during": during, "after": state, "p2p": False}
    told = card.card_line(one)
    assert "\n" not in told and told.startswith(
        "card-v1 | 2 x NVIDIA GeForce RTX 3090 | 350 W | SM 1695 MHz (lowest 1500)"
    )
    for part in (
        "throttle: power cap",
        "gen4 (max 4) x8",
        "P2P no",
        "driver 570.10",
        "torch 2.11.0",
        "012345678",
        "1,000 tokens/s per GPU",
        "7.50 GiB",
    ):
        assert part in told
    bare = line(2000.0, gpus=1)
    assert "throttle: unknown" in card.card_line(bare) and "? W" in card.card_line(bare)


def test_the_card_lines_loss_is_compared_with_the_recorded_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = line(2000.0, loss=11.7)
    assert card.loss_verdict(one, None) == "nothing to compare with"
    assert card.loss_verdict(one, 11.71) == "as expected"
    assert card.loss_verdict(one, 11.75).startswith("DIFFERS from 11.7500: do not trust")
    assert card.loss_verdict(line(loss=float("nan")), 11.7).startswith("DIFFERS")
    assert card.loss_verdict(line(loss=11.7, ranks=2), 12.0) == "nothing to compare with"
    assert f"loss 11.7000 ({card.loss_verdict(one)})" in card.card_line(one)
    wrong = line(9000.0, gpus=1) | {
        "card_name": "card-v1",
        "check": {"within": None, "why": "its loss DIFFERS"},
    }
    assert card.measured_cards([wrong]) == {}


def test_cards_that_were_never_measured_are_labelled() -> None:
    measured = card.measured_cards(
        [line(1300.0, gpus=1) | {"card_name": "card-v1"}, line(9999.0, gpus=1)]
    )
    assert measured == {"3090": 1300.0}
    rows = card.predictions(measured)
    assert any(row.startswith("| 3090 | 1,300 | measured") for row in rows)
    assert all(
        "PREDICTED" in row for row in rows[2 : rows.index("")] if not row.startswith("| 3090 ")
    )


def test_the_fused_engine_is_predicted_by_card_and_memory_profile() -> None:
    rows = card.predictions({})
    title, _, _, _, *lines = rows[rows.index("") + 1 :]
    assert "execution.engine=fused, PREDICTED" in title
    cells = {
        tuple(line.split(" | ")[:2]): [cell.strip(" |") for cell in line.split(" | ")[2:]]
        for line in lines
    }
    assert len(cells) == 12
    layers, gib, speed = cells["| 4090", "fill"]
    least, least_gib, slower = cells["| 4090", "min"]
    assert layers.startswith("32, ") and least == "1, 0"
    assert float(gib) > 20 and float(least_gib) < 8
    assert float(speed.replace(",", "")) > 1.2 * float(slower.replace(",", ""))
    # of the reference engine on the same rows
    reference = next(row for row in rows if row.startswith("| 4090 | ")).split(" | ")[1]
    assert float(slower.replace(",", "")) > float(reference.replace(",", ""))


# --- the command


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
