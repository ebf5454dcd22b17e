"""The memory ledger against live bytes and an H100's measurements.

Also judgements of cards.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import peaks
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.base.checks import dtype_audit
from glassloop.base.reading import attention_for
from glassloop.config import PROJECTIONS, LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters
from glassloop.predict.cards import needed_gib, smaller_settings, verdict
from glassloop.predict.hardware import gpu_named
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import KNOWN, Shapes, shapes_from_config, shapes_of
from glassloop.predict.terms import GIB, PHASES, Work, base_bytes

R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
FULL = Work(rows=2, tokens=2048, r=16, targets=PROJECTIONS)
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FIXED = (
    "linear weights",
    "their scales",
    "embedding, head, norms",
    "adapters, fp32",
    "their gradients, fp32",
    "cuBLAS workspaces",
)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize(
    ("quantization", "precision"), [("nf4", "bf16"), ("none", "bf16"), ("nf4", "fp32")]
)
def test_each_phase_is_predicted_from_shapes_as_its_bytes_live(
    wide_llama, engine_of, quantization, precision, checkpointing
):
    engine = engine_of(
        wide_llama,
        lora=LoraConfig(r=16),
        precision=precision,
        checkpointing=checkpointing,
        quantization=quantization,
    )
    adapters = FlatAdapters(engine.hf.named_parameters())
    shapes, _ = shapes_of(str(wide_llama))
    assert shapes is not None
    # logits in two chunks, and in one; few places, where a dequantised weight is above all else
    for rows, tokens, supervised, tolerance in (
        (2, 512, 511, 0.03),
        (1, 256, 40, 0.03),
        (1, 96, 8, 0.07),
    ):
        mask = [False] * (tokens - supervised) + [True] * supervised
        batch = [
            Row(f"row:{i}", tuple((7 * place + i) % 4000 for place in range(tokens)), tuple(mask))
            for i in range(rows)
        ]
        p = build_pass(batch, packed=False, pad_id=0, device=torch.device("cpu"))
        peaks(engine, adapters, p, autocast=precision == "bf16")  # the first pass makes what stays
        found = peaks(engine, adapters, p, autocast=precision == "bf16")
        work = Work(
            rows=rows,
            tokens=tokens,
            supervised_tokens=p.supervised_tokens,
            r=16,
            targets=PROJECTIONS,
            quantization=quantization,
            precision=precision,
            checkpointing=checkpointing,
        )
        terms = ledger_of(shapes, work).terms
        for phase, measured in found.items():
            moving = sum(
                term.size_bytes
                for term in terms
                if phase in term.phases and term.what not in FIXED and "state of" not in term.what
            )
            assert moving == pytest.approx(measured, rel=tolerance), (phase, rows, tokens)


@pytest.mark.parametrize("tokens", [48, 96])
def test_scores_that_are_computed_eagerly_are_counted_as_autograd_keeps_them(tokens):
    """sdpa has no cap, so a Gemma 2 keeps (heads, tokens, tokens) three times over."""
    config = AutoConfig.for_model("gemma2", **SMALL, attn_logit_softcapping=50.0)
    how = attention_for("sdpa", config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=how).bfloat16()
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.shape[-2:] == (tokens, tokens) and t.numel() == heads * tokens**2:
            kept[t.data_ptr()] = t
        return t

    heads = SMALL["num_attention_heads"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(input_ids=torch.arange(tokens).unsqueeze(0)).logits.sum()
    assert loss.requires_grad
    measured = sum(t.numel() * t.element_size() for t in kept.values())
    capped = shapes_from_config(config.to_dict(), "x")
    assert capped is not None
    work = Work(rows=1, tokens=tokens, r=4, targets=PROJECTIONS, checkpointing=False)
    eager, not_capped = (
        sum(t.size_bytes for t in ledger_of(one, work).terms if t.what == "stored by all layers")
        for one in (capped, replace(capped, family="llama"))
    )
    assert eager - not_capped == measured


def test_the_peaks_that_an_h100_measured_are_predicted():
    """Peaks of the loop on random 8B weights.

    7.63 GiB on full rows, 6.33 to 6.43 on calls (up to 2 x 430 to 650 tokens a pass).
    """
    assert ledger_of(R1, FULL).peak_bytes / GIB == pytest.approx(7.63, rel=0.01)
    scam = [replace(FULL, tokens=tokens, supervised_tokens=200) for tokens in (430, 650)]
    low, high = (ledger_of(R1, work).peak_bytes / GIB for work in scam)
    assert low == pytest.approx(6.33, rel=0.02)
    assert high == pytest.approx(6.43, rel=0.02)


def test_base_bytes_are_those_of_the_loaded_tensors(wide_llama, engine_of):
    engine = engine_of(wide_llama, precision="bf16", quantization="nf4")
    shapes, _ = shapes_of(str(wide_llama))
    sizes: Counter[str] = Counter()
    for group in dtype_audit(engine.hf):
        sizes[group.kind] += group.size_bytes
    expected = base_bytes(shapes, Work(1, 8, 4, PROJECTIONS))
    assert expected["linear weights"] == sizes["quantised linear"]
    assert expected["their scales"] == pytest.approx(sizes["quantisation scales"], rel=0.02)
    assert expected["embedding, head, norms"] == sizes["embedding"] + sizes["head"] + sizes["norm"]


def test_parameters_are_those_of_the_built_model(wide_llama, engine_of):
    shapes, where = shapes_of(str(wide_llama))
    assert where.endswith("config.json")
    for r, targets in ((4, PROJECTIONS), (16, ("q_proj", "down_proj"))):
        engine = engine_of(wide_llama, lora=LoraConfig(r=r, targets=targets))
        trained = FlatAdapters(engine.hf.named_parameters()).trainable
        assert shapes.lora_weights(r, targets) == trained
        assert shapes.weights == sum(
            p.numel() for p in engine.hf.parameters() if not p.requires_grad
        )


def test_the_known_architectures_have_the_recipes_numbers():
    assert R1.lora_weights(16, PROJECTIONS) == 41_943_040
    assert R1.weights == 8_030_261_248
    assert KNOWN["smollm2"].lora_weights(16, PROJECTIONS) == 4_884_480
    assert KNOWN["smollm2"].weights == 134_515_008  # its head is the embedding


def test_an_unknown_architecture_is_not_taken_for_a_known_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "hidden_size": 64}))
    shapes, why = shapes_of(str(tmp_path))
    assert shapes is None and "model_type gemma3 is not one of" in why
    shapes, why = shapes_of("owner/never-heard-of")
    assert shapes is None and "Download it first" in why
    with pytest.raises(ValueError, match="lacks or garbles a size"):
        shapes_from_config({"model_type": "llama", "hidden_size": 64}, "x")
    with pytest.raises(ValueError, match=r"lora.targets = c_attn: .* has q_proj"):
        R1.trainable(lambda _: 8, ("c_attn",))


def test_an_engine_without_a_profile_is_refused():
    with pytest.raises(
        ValueError,
        match=r"execution.engine = unsloth: no memory profile; there is one for peft, fused",
    ):
        ledger_of(R1, FULL, engine="unsloth")


def test_every_term_has_a_phase_and_the_peak_is_the_largest():
    ledger = ledger_of(R1, FULL)
    assert all(
        term.phases and set(term.phases) <= set(PHASES) and term.size_bytes > 0
        for term in ledger.terms
    )
    phases = ledger.phases
    assert list(phases) == [*PHASES, "peak"]
    assert phases["peak"] == max(phases[phase] for phase in PHASES)


@given(
    rows=st.integers(1, 8),
    tokens=st.integers(16, 4096),
    r=st.sampled_from([8, 16, 32]),
    quantization=st.sampled_from(["nf4", "none"]),
    precision=st.sampled_from(["bf16", "fp32"]),
    checkpointing=st.booleans(),
)
def test_more_work_never_needs_less(rows, tokens, r, quantization, precision, checkpointing):
    work = Work(
        rows=rows,
        tokens=tokens,
        r=r,
        targets=PROJECTIONS,
        quantization=quantization,
        precision=precision,
        checkpointing=checkpointing,
    )
    peak = ledger_of(R1, work).peak_bytes
    for more in (dict(rows=rows + 1), dict(tokens=tokens + 16), dict(r=2 * r)):
        assert ledger_of(R1, replace(work, **more)).peak_bytes >= peak


def test_a_card_that_is_too_small_is_told_which_fields_fit():
    card = gpu_named("4090")
    stored = replace(FULL, checkpointing=False)
    one = verdict(card, R1, stored, ranks=2, rows_per_update=16)
    assert not one.fits and one.needed_gib > one.has_gib
    assert one.cure == "execution.checkpointing=true" and one.cure_gib < one.has_gib
    recomputed = verdict(card, R1, FULL, ranks=2, rows_per_update=16)
    assert recomputed.fits and recomputed.cure is None
    assert (
        recomputed.faster == "execution.checkpointing=false batch.size=1 batch.rows_per_update=16"
    )
    tiny = verdict(card, R1, FULL, ranks=2, rows_per_update=16, free_gib=4.0)
    assert not tiny.fits and tiny.cure is None
    assert "fp16" in verdict(gpu_named("T4"), R1, FULL, ranks=1, rows_per_update=16).note


@given(
    rows=st.integers(1, 8),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    checkpointing=st.booleans(),
    quantization=st.sampled_from(["nf4", "none"]),
)
def test_smaller_settings_keep_the_rows_of_an_update(
    rows, ranks, accumulation, checkpointing, quantization
):
    per_update = rows * ranks * accumulation
    work = replace(FULL, rows=rows, checkpointing=checkpointing, quantization=quantization)
    for fields, smaller in smaller_settings(work, ranks=ranks, rows_per_update=per_update):
        assert per_update % (smaller.rows * ranks) == 0, fields
        assert needed_gib(R1, smaller, ranks) < needed_gib(R1, work, ranks)
        if smaller.rows != rows:
            assert f"batch.size={smaller.rows} batch.rows_per_update={per_update}" in fields


def test_the_benchmark_measures_every_cell_and_does_not_count_calibration(
    wide_llama, tmp_path, monkeypatch, capsys
):
    import memory

    assert len(memory.MATRIX) == 24
    assert memory.Cell(2048, 2, True, 16) in memory.CALIBRATION
    cells = (
        memory.Cell(32, 1, True, 8),
        memory.Cell(32, 2, False, 16),
        memory.Cell(16, 1, True, 16),
    )
    monkeypatch.setattr(memory, "MATRIX", cells)
    monkeypatch.setattr(memory, "CALIBRATION", cells[:1])
    recomputed, measure = [], memory.one_update

    def watched(engine, adapters, *rest):
        recomputed.append(
            any(getattr(module, "gradient_checkpointing", False) for module in engine.hf.modules())
        )
        needs_grad = (
            engine.hf.get_input_embeddings()._forward_hooks
        )  # PEFT's, which make the embeddings' output require grad
        return (
            measure(engine, adapters, *rest)
            | {"peak": GIB * adapters.trainable}
            | ({"peak": None} if needs_grad else {})
        )

    monkeypatch.setattr(memory, "one_update", watched)
    out = tmp_path / "memory.jsonl"
    code = memory.main(
        ["--out", str(out), "--commit", "abc", f"model.id={wide_llama}", "model.quantization=none"]
    )
    machine, *found, summary = [json.loads(line) for line in out.read_text().splitlines()]
    assert (machine["kind"], machine["commit"], machine["shapes"]["hidden"]) == (
        "machine",
        "abc",
        256,
    )
    assert recomputed == [True, True, False, False, True, True]
    assert [line["calibrates"] for line in found] == [True, False, False]
    shapes = Shapes("wide", 4, 256, 896, 8, 2, 32, 4096)
    assert [line["measured_gib"]["peak"] for line in found] == [
        shapes.lora_weights(cell.r, PROJECTIONS) for cell in cells
    ]
    assert summary["cells_that_count"] == 2
    assert summary["within_mark"] is False and code == 1  # the planted peak is nowhere near
