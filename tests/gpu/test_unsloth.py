"""The engine `unsloth` on a GPU, beside the reference on the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glassloop import unsloth_checks

PROBLEMS = unsloth_checks.problems(on_cuda=torch.cuda.is_available())
pytestmark = pytest.mark.skipif(bool(PROBLEMS), reason="execution.engine=unsloth cannot run here: " + "; ".join(PROBLEMS))

NOISE = (2e-3, 5e-2)  # of loss and gradient norm in bf16, as the benchmark holds engines to


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A Llama whose heads have the 64 places that fast attention kernels ask for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("wide-llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def wide_run(run_of, wide_llama):
    def build(engine: str, **sections: dict):
        execution = {"engine": engine, **sections.pop("execution", {})}
        sections["model"] = {"id": str(wide_llama), **sections.get("model", {})}
        return run_of(execution=execution, **sections)

    return build


def update(run, u: int):
    from train_loop import update_once

    outcome = update_once(run, u)
    assert outcome is not None
    return outcome.record


@pytest.mark.parametrize(
    "execution", [{}, {"checkpointing": False}, {"layout": "packed", "pass_tokens": 384}, {"precision": "fp16"}]
)
def test_update_1_has_the_references_loss_norm_and_gradient(wide_run, execution):
    found, stability = {}, {"initial_loss_scale": 1024.0}
    for engine in ("peft", "unsloth"):
        run = wide_run(engine, execution=execution, stability=stability, optimizer={"max_grad_norm": None})
        with torch.no_grad():  # B is 0 at first, and then hides what A does
            for name, p in run.adapters.parameters.items():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02)
        record = update(run, 1)
        run.adapters.check_views()
        found[engine] = record, run.adapters.grad.double().cpu()
        assert record.action == "applied"
    (ours, mine), (theirs, reference) = found["unsloth"], found["peft"]
    assert ours.loss_nats == pytest.approx(theirs.loss_nats, rel=NOISE[0])
    assert ours.grad_norm_pre_clip == pytest.approx(theirs.grad_norm_pre_clip, rel=NOISE[1])
    assert float((mine - reference).norm() / reference.norm()) < 0.1
    assert (ours.supervised_tokens, ours.real_tokens) == (theirs.supervised_tokens, theirs.real_tokens)


def test_row_sums_are_the_references(wide_run):
    sums = {}
    for engine in ("peft", "unsloth"):
        outcome = __import__("train_loop").update_once(wide_run(engine), 1)
        sums[engine] = torch.tensor([row.loss_sum_nats for row in outcome.rows])
    assert torch.allclose(sums["unsloth"], sums["peft"], rtol=1e-2)


@pytest.mark.parametrize("engines", [("peft", "unsloth"), ("unsloth", "peft")])
def test_a_checkpoint_of_one_engine_goes_on_in_the_other(wide_run, engines):
    first = wide_run(engines[0])
    first.begin()
    for u in (1, 2, 3):
        first.tell(__import__("train_loop").update_once(first, u))
    first.save(3)
    expected = update(first, 4)
    first.close_observers()
    second = wide_run(engines[1], resume={"run": str(first.folder)})
    assert second.first_update == 4 and second.plain_engine.name == engines[1]
    found = update(second, 4)
    second.close_observers()
    assert found.loss_nats == pytest.approx(expected.loss_nats, rel=NOISE[0])
    assert found.grad_norm_pre_clip == pytest.approx(expected.grad_norm_pre_clip, rel=NOISE[1])


def test_answers_between_updates_leave_recomputation_and_views_as_they_were(wide_run):
    from glassloop.generation import generate

    run = wide_run("unsloth")
    update(run, 1)
    decoder = run.plain_engine.hf.get_base_model().get_decoder()
    before = [bool(getattr(module, "gradient_checkpointing", False)) for module in decoder.modules()]
    assert any(before)
    answers = generate(
        run.plain_engine.hf, [[1, 5, 9], [1, 7]], stop_ids=(2,), pad_id=0, batch_size=2, max_new_tokens=8, device=run.device,
        autocast=run.accelerator.autocast,
    )  # fmt: skip
    assert all(answers)
    update(run, 2)
    assert [bool(getattr(module, "gradient_checkpointing", False)) for module in decoder.modules()] == before
    run.adapters.check_views()


def test_the_loss_falls(wide_run):
    run = wide_run("unsloth")
    losses = [update(run, u).loss_nats for u in range(1, 31)]
    run.adapters.check_views()
    assert losses[-1] < losses[0] - 0.5
