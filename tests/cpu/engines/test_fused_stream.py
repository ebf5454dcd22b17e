"""A streamed base gives the bits of one on the card."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import shutil

import pytest
import torch

from glassloop.config import LoraConfig, ModelConfig
from glassloop.config.arguments import parse
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.doctor.checks import check_engine
from glassloop.doctor.findings import PROBLEM
from glassloop.engines.adapters import attach_lora
from glassloop.formula.optim import FlatAdapters
from glassloop.plan.engine import planned_engine
from glassloop.plan.families import Unsupported
from glassloop.plan.support import groups_of
from glassloop.predict.tiers import Tiers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which has no build here"
)
CPU = torch.device("cpu")


def streamed(folder, *, precision="fp32", double=True, r=4):
    """The fused engine over a mapped file, with non-zero adapters."""
    from glassloop.base.streamed import load_streamed
    from glassloop.engines.fused.engine import FusedEngine

    model = ModelConfig(id=str(folder), quantization="nf4", double_quantization=double)
    hf, report, pages = load_streamed(
        model, groups_of, precision=precision, device=CPU, first=contextlib.nullcontext
    )
    peft = attach_lora(hf, LoraConfig(r=r, alpha=8), seed=0, base_name="base", commit=None)
    return FusedEngine(peft, report, pages=pages), adapters_of(peft)


def adapters_of(peft) -> FlatAdapters:
    adapters = FlatAdapters(peft.named_parameters())
    torch.manual_seed(3)
    adapters.flat.data.copy_(torch.randn_like(adapters.flat) * 0.05)
    return adapters


def passes_of(*lengths):
    generator = random.Random(0)
    rows = [
        Row(
            f"r{i}",
            tuple(generator.randrange(5, 500) for _ in range(n)),
            tuple(place >= n // 2 for place in range(n)),
        )
        for i, n in enumerate(lengths)
    ]
    return [build_pass([row], packed=True, pad_id=0, device=CPU) for row in rows]


def gradient(engine, adapters, passes):
    adapters.zero_grad()
    sums = []
    for p in passes:
        loss_sum, _ = engine(p)
        (loss_sum / 7).backward()
        sums.append(loss_sum.item())
    return sums, adapters.grad.clone()


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def folder(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("double", [True, False])
def test_every_number_of_streamed_layers_gives_the_same_bits(engine_of, folder, double):
    from glassloop.engines.fused.engine import FusedEngine

    passes = passes_of(12, 7, 20)
    lora = LoraConfig(r=4, alpha=8)
    before = engine_of(folder, quantization="nf4", double_quantization=double, lora=lora)
    resident = FusedEngine(before.hf, before.report)
    wanted = gradient(resident, adapters_of(before.hf), passes)
    engine, adapters = streamed(folder, double=double)
    for count, kept, host in (
        (2, 0, "nothing"),
        (2, 1, "all"),
        (1, 1, "inputs"),
        (1, 2, "nothing"),
        (0, 0, "attention"),
        (0, 1, "nothing"),
        (2, 2, "all"),
    ):
        engine.use_tiers(Tiers(kept, host, streamed=count))
        found = gradient(engine, adapters, passes)
        assert found[0] == wanted[0] and torch.equal(found[1], wanted[1]), (count, kept, host)
        with torch.no_grad():
            assert [engine(p)[0].item() for p in passes] == wanted[0]  # and forward alone


def test_the_base_is_the_one_that_transformers_loads(engine_of, folder):
    """Its checksum, its tensors' names, and what the model over it computes."""
    reference = engine_of(folder, quantization="nf4")
    engine, _ = streamed(folder)
    assert engine.report.checksum == reference.report.checksum
    assert engine.report.base_hash == reference.report.base_hash
    assert set(engine.hf.state_dict()) == set(reference.hf.state_dict())
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad(), engine.hf.disable_adapter(), reference.hf.disable_adapter():
        for count in (2, 1, 0):  # and so it does when layers move to the card
            engine.use_tiers(Tiers(0, "nothing", streamed=count))
            assert torch.equal(engine.hf(input_ids=ids).logits, reference.hf(input_ids=ids).logits)


def test_a_file_that_was_cut_short_or_changed_is_refused_by_its_name(
    tiny_llama, monkeypatch, tmp_path
):
    monkeypatch.setenv("GLASSLOOP_CACHE", str(tmp_path))
    engine, _ = streamed(tiny_llama)
    file = next(tmp_path.glob("layers/*/base.bin"))
    whole = file.read_bytes()
    del engine
    file.write_bytes(whole[:-4096])
    with pytest.raises(ValueError, match=r"delete the folder .*layers"):
        streamed(tiny_llama)
    file.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(ValueError, match=r"checksum .*delete the folder"):
        streamed(tiny_llama)


def test_a_second_run_reads_the_file_that_the_first_one_made(tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("GLASSLOOP_CACHE", str(tmp_path))
    first, second = streamed(tiny_llama)[0].report, streamed(tiny_llama)[0].report
    assert not first.from_cache and second.from_cache and first.checksum == second.checksum
    assert len(list(tmp_path.glob("layers/*"))) == 1 and not list(tmp_path.glob("quantized/*"))


def test_slots_are_filled_ahead_and_in_the_order_of_the_pass(folder):
    """An early layer, or a slot reused too soon, would change bits."""
    engine, adapters = streamed(folder)
    stream, seen = engine.stream, []
    fill = stream.fill

    def watch(index, layer, scratch):
        seen.append((index, [layer for layer, *_ in stream.here]))
        fill(index, layer, scratch)

    stream.fill = watch
    gradient(engine, adapters, passes_of(9))
    assert [index for index, _ in seen] == [0, 1, 1, 0]
    assert seen[0][1] == [0, 1] and seen[1][1] == [1, 0]  # the turn: layer 1 is not copied again
    assert [layer for layer, *_ in stream.here] == [0, 1]  # the next pass has begun to come


def test_a_pass_that_finds_no_memory_for_a_layer_leaves_the_next_one_all_slots(folder):
    engine, adapters = streamed(folder)
    passes = passes_of(9)
    expected = gradient(engine, adapters, passes)
    homes = [linear.packed for one in engine.layers for linear in one.linears]
    weights, lacking = engine.scratch.weights, [True, True, True]

    def short_of_memory(linear):
        if lacking and linear.group == "down":
            lacking.pop()
            raise torch.OutOfMemoryError("no room for the weights")
        return weights(linear)

    engine.scratch.weights = short_of_memory
    while lacking:
        with pytest.raises(torch.OutOfMemoryError):
            gradient(engine, adapters, passes)
    assert len(engine.stream.here) + len(engine.stream.vacant) == 2
    now = [linear.packed for one in engine.layers for linear in one.linears]
    assert all(one is other for one, other in zip(now, homes, strict=True))
    found = gradient(engine, adapters, passes)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def run_fused(run_of, **memory):
    execution = {"engine": "fused", "precision": "fp32", "layout": "packed"}
    return run_of(execution=execution, memory={"profile": "min", **memory})


@pytest.mark.parametrize(("asked", "streamed"), [("auto", 0), ("gpu", 0), ("host", 2), (1, 1)])
def test_a_run_says_where_its_base_lies_and_trains_alike(run_of, asked, streamed):
    from train_loop import update_once

    run = run_fused(run_of, base=asked)
    assert run.tiers["streamed"] == streamed
    assert ("streamed from the host" in " ".join(run.header)) == bool(streamed)
    run.begin()
    losses = [update_once(run, u).record.loss_nats for u in (1, 2)]
    plain = run_fused(run_of, base="gpu")
    plain.begin()
    assert losses == [update_once(plain, u).record.loss_nats for u in (1, 2)]


def test_a_run_resumes_with_another_place_for_its_base_to_the_bit(run_of):
    from train_loop import update_once

    run = run_fused(run_of, base="gpu")
    run.begin()
    run.tell(update_once(run, 1))
    run.save(1)
    run.tell(update_once(run, 2))
    run.close_observers()
    execution = {"engine": "fused", "precision": "fp32", "layout": "packed"}
    memory = {"profile": "min", "base": "host"}
    again = run_of(execution=execution, memory=memory, resume={"run": str(run.folder)})
    assert again.first_update == 2 and again.tiers["streamed"] == 2
    update_once(again, 2)
    for name, p in again.replica.adapters.parameters.items():
        assert torch.equal(p, run.replica.adapters.parameters[name]), name


@pytest.mark.parametrize("asked", ["disk", "12 GB", -1, 1.5])
def test_a_place_that_is_none_is_refused_by_its_field(asked):
    from glassloop.config.arguments import from_values

    with pytest.raises(ValueError, match=r"memory\.base"):
        from_values({"memory": {"base": asked}})


def test_as_few_layers_stream_as_needed():
    """And all stay on the GPU where they fit, whatever the profile."""
    from glassloop.predict.choice import Asked, Base, Room, choose
    from glassloop.predict.shapes import KNOWN
    from glassloop.predict.tiers import GIB, sizes_of

    shapes = KNOWN["random:llama-70b"]
    one = sizes_of(shapes, 16, tuple(shapes.projections), 2)
    layer = 441_400_000

    def streamed(free_gib, asked="auto", profile="min"):
        room = Room(5 * GIB, int(free_gib * GIB), base=Base(asked, layer))
        return choose(Asked(profile, 4096, 4096, 100 * GIB), room, one, 80).streamed

    found = [streamed(free) for free in (2, 8, 16, 24, 32, 60)]
    assert found == sorted(found, reverse=True) and found[0] == 80 and found[-1] == 0
    assert len(set(found)) >= 5
    assert (
        streamed(60, profile="fill") == 0 and streamed(4, "gpu") == 0 and streamed(60, "host") == 80
    )
    assert streamed(60, 12) == 68 and streamed(60, "12GiB") == 80 - 12 * GIB // layer


def test_a_model_that_fused_does_not_support_is_refused_by_its_field(tiny_llama, tmp_path):
    folder = tmp_path / "dynamic"
    shutil.copytree(tiny_llama, folder)
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(Unsupported, match=r"^the model's config has rope_type = 'dynamic', fused"):
        streamed(folder)
    config = parse([f"model.id={folder}", "execution.engine=fused"])
    with pytest.raises(ValueError, match=r"rope_type = 'dynamic'.*set execution.engine=peft$"):
        planned_engine(config)
    (found,) = check_engine(config, on_cuda=True)
    assert found.level == PROBLEM and "rope_type = 'dynamic'" in found.text
