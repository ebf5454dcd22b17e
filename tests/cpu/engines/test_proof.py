"""The proof before update 1 refuses unsound engines by a matrix's name."""

from __future__ import annotations

import contextlib
import importlib.util
import random
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.build import build_engine
from glassloop.engines.peft import PeftEngine
from glassloop.formula.optim import FlatAdapters
from glassloop.loop import proving, starting
from glassloop.plan.engine import Choice

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
if importlib.util.find_spec("triton") is not None:
    from glassloop.engines.fused import linear
    from glassloop.engines.fused import proof as the_proof

CPU = torch.device("cpu")


def rows_of(*lengths: int, supervised: int = 1000) -> list[Row]:
    generator = random.Random(0)
    return [
        Row(
            f"r{i}",
            tuple(generator.randrange(5, 500) for _ in range(n)),
            tuple(place >= max(1, n - supervised, n // 2) for place in range(n)),
        )
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def equal_qwen2(tmp_path_factory, tiny_tokenizer):
    """Biases, a tied head, and o as large as down."""
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("equal-qwen2")
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def fused_on(folder, precision="fp32", **lora):
    engine = build_engine(
        ModelConfig(id=str(folder), quantization="nf4"),
        LoraConfig(**{"r": 4, "alpha": 8, **lora}),
        precision=precision,
        checkpointing=False,
        seed=0,
        device=CPU,
        first=contextlib.nullcontext,
        engine="fused",
    )
    return engine, FlatAdapters(engine.hf.named_parameters())


def said(engine, adapters, rows=None, packed=False) -> str:
    rows = rows_of(50, 30) if rows is None else rows
    return the_proof.disagreement(engine, adapters, rows, packed=packed, pad_id=0)


def outward(change):
    """Linear.outward with each group's moves changed: what goes to the adapters' gradients."""
    own = linear.Linear.outward

    def changed(self, scratch):
        return change(self, own(self, scratch))

    return changed


def test_groups_whose_gradients_are_mixed_up_are_refused_by_name(equal_qwen2, monkeypatch):
    monkeypatch.setattr(linear.Scratch, "products", by_shape)
    text = said(*fused_on(equal_qwen2))
    assert "the gradient of model.layers.1.mlp.down_proj.lora_B is off by " in text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_wrong_scaling_is_refused_by_name(equal_qwen2, monkeypatch, matrix, precision):
    engine, adapters = fused_on(equal_qwen2, precision)
    at = engine.layers[0].o

    def change(self, moves):
        place = 0 if matrix == "lora_A" else 1
        if self is at:
            moves[place] = replace(moves[place], scaling=2 * moves[place].scaling)
        return moves

    monkeypatch.setattr(linear.Linear, "outward", outward(change))
    assert f"the gradient of model.layers.0.self_attn.o_proj.{matrix} is off by 1" in said(
        engine, adapters
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bias_that_is_left_out_is_refused_by_name(equal_qwen2, precision):
    engine, adapters = fused_on(equal_qwen2, precision)
    one = engine.layers[1].qkv
    one.b[:, one.adapted] = 0
    text = said(engine, adapters)
    assert "the gradient of model.layers.1." in text
    assert precision == "bf16" or "its loss is " in text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "lora", [{}, {"targets": ("o_proj",)}, {"targets": ("q_proj", "up_proj"), "r": 1}]
)
@pytest.mark.parametrize(
    "rows",
    [rows_of(50, 30), rows_of(90, 70, supervised=1), rows_of(2, 2), rows_of(3)],
    ids=["usual", "one label", "two tokens", "one row"],
)
def test_sound_models_of_odd_shapes_pass(equal_qwen2, precision, packed, lora, rows):
    assert said(*fused_on(equal_qwen2, precision, **lora), rows, packed) == ""


def test_it_leaves_adapters_gradients_and_random_numbers_bit_for_bit(equal_qwen2):
    engine, adapters = fused_on(equal_qwen2, "bf16")
    adapters.flat.data[::3] = -0.0
    before, random_before = adapters.flat.detach().clone(), torch.get_rng_state()
    config = engine.hf.get_base_model().config
    assert said(engine, adapters) == ""
    assert torch.equal(before.view(torch.int32), adapters.flat.detach().view(torch.int32))
    assert torch.equal(random_before, torch.get_rng_state()) and not adapters.grad.any()
    dtypes = {m.compute_dtype for m in engine.hf.modules() if hasattr(m, "compute_dtype")}
    assert dtypes == {torch.bfloat16} and config._attn_implementation == "sdpa"
    assert not engine.hf.get_base_model().is_gradient_checkpointing
    adapters.check_views()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("beyond", [1, 2, 3])
def test_a_difference_in_bf16_counts_if_other_adapters_show_it_too(
    equal_qwen2, monkeypatch, precision, beyond
):
    """In fp32, where nothing is rounded away, the first counts."""
    engine, adapters = fused_on(equal_qwen2, precision)
    asked: list[float] = []

    def judged(names, found, dtype, labels) -> str:
        asked.append(found.loss)
        return "beyond" if len(asked) <= beyond else ""

    monkeypatch.setattr(the_proof, "judged", judged)
    counts = precision == "fp32" or beyond == the_proof.DRAWS
    assert said(engine, adapters) == ("beyond" if counts else "")
    assert len(asked) == len(set(asked)) == (1 if precision == "fp32" else min(beyond + 1, 3))


def test_rows_are_cut_where_labels_see_several_tokens():
    long, late = rows_of(400)[0], rows_of(90, supervised=1)[0]
    for row in (long, late):
        cut = the_proof.piece(row)
        assert len(cut) == 16 and any(cut.supervised[6:]) and not cut.supervised[0]
    two = rows_of(*[2] * 70)
    assert sum(map(len, the_proof.short_rows([*two, long]))) == 64
    unlabelled = [replace(row, supervised=(False, False)) for row in two]
    assert the_proof.short_rows([*unlabelled, late]) == [the_proof.piece(late)]


def test_the_truth_is_the_fp32_model(equal_qwen2):
    """An engine whose weights are fp32 computes the same loss and gradient."""
    engine, adapters = fused_on(equal_qwen2, "bf16")
    other, others = fused_on(equal_qwen2, "fp32")
    p = build_pass(rows_of(16, 12), packed=False, pad_id=0, device=CPU)
    with the_proof.drawn_adapters(engine, adapters), the_proof.drawn_adapters(other, others):
        reference = PeftEngine(engine.hf, engine.report).train()
        loss = the_proof.exact(reference, engine.head, p)
        wanted, _ = other(p)
        wanted.backward()
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-3)
        assert float((adapters.grad - others.grad).norm() / others.grad.norm()) < 0.03


def by_shape(self, linear):
    """Room for gradients kept by shape, as it was once."""
    key, wide = (linear.rank, linear.rows, linear.columns), (linear.a, linear.b)
    self.sums.setdefault(key, tuple(torch.empty_like(t, dtype=torch.float32) for t in wide))
    return self.sums[key]


@pytest.fixture
def auto_takes_fused(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(starting, "engine_here", lambda *_: Choice("fused"))


def test_a_run_whose_fused_engine_is_unsound_takes_peft_and_says_so(
    equal_qwen2, run_of, monkeypatch, auto_takes_fused
):
    monkeypatch.setattr(linear.Scratch, "products", by_shape)
    sections = {"execution": {"engine": "auto", "precision": "fp32"}}
    run = run_of(model={"id": str(equal_qwen2)}, **sections)
    why = "fused does not compute what peft computes: the gradient of model.layers.1.mlp.down_proj"
    assert run.replica.plain_engine.name == run.config.execution.engine == "peft"
    assert run.contract.facts["engine"] == "peft"
    assert any(line.startswith(f"engine    peft (auto: {why}") for line in run.header)
    (notice,) = run.changes
    assert notice.kind == "warning" and why in notice.message
    assert notice.message.endswith(": the run takes peft")
    assert "engine: peft" in (run.folder / "config.yaml").read_text()
    assert run.replica.plain_engine.hf.get_base_model().is_gradient_checkpointing


def test_an_unsound_engine_that_was_named_is_refused(equal_qwen2, run_of, monkeypatch):
    sections = {"model": {"id": str(equal_qwen2)}, "execution": {"engine": "fused"}}
    run_of(**sections)
    monkeypatch.setattr(linear.Scratch, "products", by_shape)
    with pytest.raises(ValueError, match=r"execution.engine = fused: .*down_proj.*engine=peft"):
        run_of(**sections)


def test_one_ranks_doubt_is_everyones(equal_qwen2, run_of, monkeypatch, auto_takes_fused):
    other = proving.Doubt("a kernel is wrong")
    monkeypatch.setattr(proving, "gather_objects", lambda mine: [mine, other])
    sections = {"execution": {"engine": "auto"}}
    run = run_of(model={"id": str(equal_qwen2)}, **sections)
    assert run.replica.plain_engine.name == "peft"


def test_a_kernel_that_fails_is_a_doubt_and_no_traceback(equal_qwen2, run_of, monkeypatch):
    def fail(*_, **__):
        raise TypeError("'constexpr' object is not callable\nand more")

    monkeypatch.setattr(linear.Linear, "accumulate", fail)
    with pytest.raises(ValueError, match=r"TypeError: 'constexpr' object is not callable\)"):
        run_of(model={"id": str(equal_qwen2)}, execution={"engine": "fused"})
