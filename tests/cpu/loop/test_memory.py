"""What a run says of memory: predicted beside measured, and settings that would fit."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from family_models import saved_model

from glassloop.config import PROJECTIONS, Config
from glassloop.config.arguments import from_values, parse
from glassloop.loop import build, spending
from glassloop.loop import memory as room
from glassloop.loop.header import layout_of
from glassloop.plan.work import work_of
from glassloop.predict.shapes import KNOWN, shapes_of
from glassloop.predict.spend import pass_tokens_of

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
LLAMA_8B = {  # the 8B's config, as a model has it
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """As if the run's device were a GPU whose allocator has held 3 GiB."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * room.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return SimpleNamespace(type="cuda")


@pytest.mark.parametrize("layout", ["literal", "packed"])
def test_predicted_memory_stands_beside_measured(run_of, on_a_gpu, layout):
    run = run_of(execution={"precision": "fp32", "checkpointing": False, "layout": layout})
    window = run.batches.heaviest()
    assert room.memory_lines(run, window) == []  # on a CPU nothing is measured
    run.replica.device = on_a_gpu
    run.measured_gib = {"load": 1.0, "adapters": 1.25}
    (line,) = room.memory_lines(run, window)
    ledger = room.ledger_of_pass(run, run.batches.share(window, 0))
    assert ledger is not None
    expected = {phase: size / room.GIB for phase, size in ledger.phases.items()}
    assert line == (
        f"predicted / measured GiB: load {expected['load']:.2f} / 1.00, adapters "
        f"{expected['adapters']:.2f} / 1.25, "
        f"peak {expected['peak']:.2f} / 3.00"
    )
    run.measured_gib["check"] = 3.5  # not a pass's, and no part of what is compared
    (with_check,) = room.memory_lines(run, window)
    assert with_check == f"{line}; at most 3.50 before the passes"


def test_projections_that_are_joined_are_predicted_as_they_stand_apart(
    run_of, on_a_gpu, tmp_path, tiny_tokenizer
):
    """A run names the layers of its model: qkv_proj and gate_up_proj."""
    folder, _ = saved_model("phi3", tmp_path, tiny_tokenizer, vocab_size=512)
    run = run_of(model={"id": str(folder)}, execution={"precision": "fp32"})
    assert "qkv_proj" in run.config.lora.targets
    run.replica.device = on_a_gpu
    (line,) = room.memory_lines(run, run.batches.heaviest())
    assert "unknown" not in line
    shapes, _ = shapes_of(str(folder))
    assert shapes is not None
    assert set(work_of(run.config, shapes).targets) == set(PROJECTIONS)


def test_a_runs_peak_is_that_of_its_passes_or_of_what_came_before(run_of, on_a_gpu, monkeypatch):
    run, reset = run_of(execution={"precision": "fp32"}), []
    assert room.peak_gib(run) == 0.0 and room.check_gib(run.replica.device) == {}
    run.replica.device = on_a_gpu
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    assert room.check_gib(on_a_gpu) == {"check": 3.0} and reset == [on_a_gpu]
    run.measured_gib = {"check": 2.0}
    assert room.peak_gib(run) == 3.0
    run.measured_gib = {"check": 3.5}
    assert room.peak_gib(run) == 3.5


def test_what_the_ledger_does_not_know_is_measured_all_the_same(run_of, on_a_gpu, monkeypatch):
    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    run.replica.device = on_a_gpu

    def unknown(*_):
        raise ValueError("lora.targets = c_attn: not in these shapes")

    monkeypatch.setattr(room, "ledger_of", unknown)
    (line,) = room.memory_lines(run, run.batches.heaviest())
    phases = "load unknown / 0.00, adapters unknown / 0.00, peak unknown / 3.00"
    assert line == f"predicted / measured GiB: {phases}"


def test_a_heavier_pass_is_predicted_to_take_more(run_of, on_a_gpu):
    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    run.replica.device = on_a_gpu
    rows = sorted(run.batches.rows, key=len)
    light, heavy = (room.ledger_of_pass(run, chosen) for chosen in (rows[:1], rows[-2:]))
    assert light is not None
    assert heavy is not None
    assert heavy.peak_bytes > light.peak_bytes
    assert room.ledger_of_pass(run, []) is None


def test_what_would_fit_leaves_the_rows_of_an_update_alone(run_of):
    text = room.cures(run_of(execution={"precision": "fp32", "checkpointing": False}))
    assert "execution.checkpointing=true" in text
    assert "batch.size=1 batch.rows_per_update=8" in text
    packed = room.cures(
        run_of(execution={"precision": "fp32", "checkpointing": True, "layout": "packed"})
    )
    assert "a smaller execution.pass_tokens" in packed
    assert "checkpointing" not in packed


@needs_triton
def test_the_prediction_stands_on_the_tiers_that_the_run_has(run_of, on_a_gpu):
    run = run_of(execution={"engine": "fused", "precision": "fp32"}, model={"quantization": "nf4"})
    run.replica.device = on_a_gpu
    rows = list(run.batches.rows[:4])
    peaks = []
    for kept in (0, 1, 2):
        run.tiers = {"kept": kept, "host": False, "held": 0}
        ledger = room.ledger_of_pass(run, rows)
        assert ledger is not None and ledger.engine == "fused"
        assert any(
            term.what.startswith(f"kept whole by {kept} layers") for term in ledger.terms
        ) == (kept > 0)
        peaks.append(ledger.peak_bytes)
    assert peaks == sorted(peaks) and peaks[0] < peaks[2]
    (line,) = room.memory_lines(run, run.batches.heaviest())
    assert "peak unknown" not in line and line.endswith("/ 3.00")


# --- packed passes as large as memory has room for


def packed_8b(**fields: object) -> Config:
    execution = {"engine": "fused", "layout": "packed"} | {
        k: v for k, v in fields.items() if k != "profile"
    }
    memory = {"profile": fields["profile"]} if "profile" in fields else {}
    return from_values({"execution": execution, "memory": memory})


@pytest.fixture
def card_of(monkeypatch: pytest.MonkeyPatch):
    """A GPU with so many GiB free beside what is reserved; `others`: what other ranks answer."""

    def make(
        free_gib: float, reserved_gib: float = 6.5, sharing: int = 1, others: tuple[int, ...] = ()
    ):
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (int(free_gib * room.GIB), 0)
        )
        monkeypatch.setattr(
            torch.cuda, "memory_reserved", lambda device: int(reserved_gib * room.GIB)
        )
        for module in (room, spending):
            monkeypatch.setattr(
                module,
                "gather_objects",
                lambda own: [own, *others] if isinstance(own, int) else [own] * sharing,
            )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
        return SimpleNamespace(type="cuda")

    return make


def test_a_packed_pass_is_as_large_as_every_layer_can_keep(card_of):
    config = packed_8b()
    tokens = room.choose_pass_tokens(config, LLAMA_8B, card_of(16.0), {})
    shapes = KNOWN["random:llama-8b"]
    assert tokens == pass_tokens_of(shapes, work_of(config, shapes), int(22.5 * room.GIB)) > 4096
    assert room.choose_pass_tokens(config, LLAMA_8B, card_of(70.0), {}) > 20_000
    assert (
        room.choose_pass_tokens(config, LLAMA_8B, card_of(2.0), {}) == config.data.max_tokens
    )  # the longest row has to fit
    assert room.choose_pass_tokens(packed_8b(profile=15.0), LLAMA_8B, card_of(70.0), {}) < tokens


def test_all_ranks_take_the_smallest_and_ranks_on_one_card_share_it(card_of):
    config = packed_8b()
    assert room.choose_pass_tokens(config, LLAMA_8B, card_of(16.0, others=(2304, 9999)), {}) == 2304
    alone = room.choose_pass_tokens(config, LLAMA_8B, card_of(10.0), {})
    assert room.choose_pass_tokens(config, LLAMA_8B, card_of(20.0, sharing=2), {}) == alone


def test_what_was_asked_or_chosen_before_stays(card_of):
    card = card_of(70.0)
    usual = 2 * 2048
    assert room.choose_pass_tokens(packed_8b(pass_tokens=3000), LLAMA_8B, card, {}) == 3000
    assert room.choose_pass_tokens(packed_8b(), LLAMA_8B, card, {"pass_tokens": 5120}) == 5120
    assert (
        room.choose_pass_tokens(packed_8b(), LLAMA_8B, card, {"updates": 60}) == usual
    )  # begun before passes were chosen
    assert room.choose_pass_tokens(packed_8b(profile="min"), LLAMA_8B, card, {}) == usual
    assert room.choose_pass_tokens(packed_8b(engine="peft"), LLAMA_8B, card, {}) == usual
    assert room.choose_pass_tokens(packed_8b(layout="literal"), LLAMA_8B, card, {}) == usual
    assert room.choose_pass_tokens(packed_8b(), {"model_type": "unheard-of"}, card, {}) == usual
    assert room.choose_pass_tokens(packed_8b(), LLAMA_8B, torch.device("cpu"), {}) == usual


@needs_triton
def test_a_run_that_goes_on_packs_as_it_began_and_so_does_its_replay(run_of, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    from glassloop.cli.__main__ import main
    from train_loop import train

    asked = []

    def chosen(config, model, device, before):
        asked.append((model["hidden_size"], device.type, before.get("pass_tokens")))
        return before.get("pass_tokens") or 130

    monkeypatch.setattr(build, "choose_pass_tokens", chosen)
    run = run_of(
        execution={"engine": "fused", "precision": "fp32", "layout": "packed"},
        model={"quantization": "nf4"},
        schedule={"updates": 3, "warmup_updates": 1},
        record={"text": "none", "capsules": 0, "probe_every_updates": None},
        checkpoint={"every_updates": 2},
    )
    assert run.batches.pass_tokens == 130
    assert "packed, the same rows in passes of at most 130 tokens" in "\n".join(run.header)
    assert json.loads((run.folder / "plan.json").read_text())["pass_tokens"] == 130
    passes = [len(rank) for rank in run.batches.window(3).passes]
    assert train(run) == 0
    run.close_observers()
    capsys.readouterr()
    AcceleratorState._reset_state(True)
    assert main(["replay", str(run.folder), "--update", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bit_for_bit"] and found["reproduces"]
    AcceleratorState._reset_state(True)
    again = build.build_run(parse(["--resume", str(run.folder), "schedule.updates=5"]))
    assert asked == [(64, "cpu", None), (64, "cpu", 130)]
    assert (
        again.batches.pass_tokens == 130
        and [len(rank) for rank in again.batches.window(3).passes] == passes
    )
    assert json.loads((run.folder / "plan.json").read_text())["pass_tokens"] == 130
    again.close_observers()


@needs_triton
def test_a_checkpoint_of_the_reference_engine_goes_on_in_the_fused_one_and_back(run_of):
    from accelerate.state import AcceleratorState

    from train_loop import update_once

    run = run_of(
        execution={"precision": "fp32", "checkpointing": False}, model={"quantization": "nf4"}
    )
    losses = []
    for update, engine in ((1, "peft"), (2, "fused"), (3, "peft")):
        if update > 1:
            AcceleratorState._reset_state(True)
            run = build.build_run(
                parse(["--resume", str(run.folder), f"execution.engine={engine}"])
            )
        assert (run.replica.plain_engine.name, run.first_update) == (engine, update)
        outcome = update_once(run, update)
        assert outcome is not None and outcome.record.action == "applied"
        run.tell(outcome)
        run.save(update)
        run.close_observers()
        losses.append(outcome.record.loss_nats)
    alone = run_of(
        execution={"precision": "fp32", "checkpointing": False}, model={"quantization": "nf4"}
    )
    wanted = [update_once(alone, update) for update in (1, 2, 3)]
    assert losses == pytest.approx(
        [one.record.loss_nats for one in wanted if one is not None], rel=1e-5
    )


def test_the_header_says_that_the_size_was_chosen():
    batches = SimpleNamespace(layout="packed", pass_tokens=5120)
    said = "packed, the same rows in passes of at most 5,120 tokens"
    chosen = layout_of(packed_8b(profile=15.0), batches, on_cuda=True)
    assert chosen == f"{said}, chosen under memory.profile=15.0"
    assert layout_of(packed_8b(), batches, on_cuda=False) == said
    assert layout_of(packed_8b(pass_tokens=5120), batches, on_cuda=True) == said


def test_a_literal_plan_has_no_pass_size(run_of):
    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    assert json.loads((run.folder / "plan.json").read_text())["pass_tokens"] is None


@needs_triton
def test_a_row_that_does_not_fit_is_refused_with_the_longest_that_does(run_of, monkeypatch):
    run = run_of(execution={"engine": "fused", "precision": "fp32"}, model={"quantization": "nf4"})
    assert "The longest row" not in room.cures(run)  # on a CPU nothing is known
    run.replica.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    found = []
    for mib in (600, 800):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, b=mib << 20: (b, 0))
        tokens = room.longest_here(run)
        assert tokens and f"The longest row that fits here has {tokens:,} tokens" in room.cures(run)
        found.append(tokens)
    assert 0 < found[0] < found[1]
