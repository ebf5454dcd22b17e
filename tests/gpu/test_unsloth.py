"""The engine `unsloth` on a GPU, beside the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glassloop.engines import unsloth_checks

PROBLEMS = unsloth_checks.problems(on_cuda=torch.cuda.is_available())
pytestmark = pytest.mark.skipif(
    bool(PROBLEMS), reason="execution.engine=unsloth cannot run here: " + "; ".join(PROBLEMS)
)

ROOT = Path(__file__).resolve().parents[2]
NOISE = (2e-3, 5e-2)  # of loss and gradient norm in bf16, as the benchmark holds engines to


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A Llama with heads of 64, which fast attention kernels need."""
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


EXECUTIONS = (
    {},
    {"checkpointing": False},
    {"layout": "packed", "pass_tokens": 384},
    {"precision": "fp16"},
)
# Of each execution the reference's record, gradient and row sums; last a run and its update 4.
REFERENCES: list = []


def first_update(wide_run, engine: str, execution: dict):
    """Record, gradient and row sums of update 1.

    B is not 0: that would hide what A does.
    """
    run = wide_run(
        engine,
        execution=execution,
        stability={"initial_loss_scale": 1024.0},
        optimizer={"max_grad_norm": None},
    )
    with torch.no_grad():
        for name, p in run.replica.adapters.parameters.items():
            if "lora_B" in name:
                p.copy_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02
                )
    outcome = __import__("train_loop").update_once(run, 1)
    run.replica.adapters.check_views()
    assert outcome is not None and outcome.record.action == "applied"
    return (
        outcome.record,
        run.replica.adapters.grad.double().cpu(),
        torch.tensor([row.loss_sum_nats for row in outcome.rows]),
    )


@pytest.fixture
def references(wide_run):
    """The reference engine's, before the import of unsloth, which patches transformers."""
    if not REFERENCES:
        assert "unsloth" not in sys.modules
        REFERENCES.extend(first_update(wide_run, "peft", execution) for execution in EXECUTIONS)
        REFERENCES.append(saved_at_3(wide_run, "peft"))
    return REFERENCES


@pytest.mark.parametrize("index", range(len(EXECUTIONS)))
def test_update_1_has_the_references_loss_norm_gradient_and_row_sums(wide_run, references, index):
    theirs, reference, their_rows = references[index]
    ours, mine, our_rows = first_update(wide_run, "unsloth", EXECUTIONS[index])
    assert ours.loss_nats == pytest.approx(theirs.loss_nats, rel=NOISE[0])
    assert ours.grad_norm_pre_clip == pytest.approx(theirs.grad_norm_pre_clip, rel=NOISE[1])
    assert float((mine - reference).norm() / reference.norm()) < 0.1
    assert torch.allclose(our_rows, their_rows, rtol=1e-2)
    assert (ours.supervised_tokens, ours.real_tokens) == (
        theirs.supervised_tokens,
        theirs.real_tokens,
    )


def test_the_reference_is_refused_where_unsloth_has_patched_the_process(wide_run, references):
    first_update(wide_run, "unsloth", {})
    with pytest.raises(ValueError, match="unsloth was imported in this process and patched"):
        wide_run("peft")


def saved_at_3(wide_run, engine: str):
    """A run saved after update 3 that has done update 4.

    With that update's record.
    """
    run = wide_run(engine)
    run.begin()
    for u in (1, 2, 3):
        run.tell(__import__("train_loop").update_once(run, u))
    run.save(3)
    record = update(run, 4)
    run.close_observers()
    return run, record


def same(found, expected) -> bool:
    return found.loss_nats == pytest.approx(
        expected.loss_nats, rel=NOISE[0]
    ) and found.grad_norm_pre_clip == pytest.approx(expected.grad_norm_pre_clip, rel=NOISE[1])


def test_a_checkpoint_of_the_reference_goes_on_in_unsloth(wide_run, references):
    first, expected = references[-1]
    run = wide_run(
        "unsloth", resume={"run": str(first.folder)}, data={"source": first.config.data.source}
    )
    assert run.first_update == 4 and run.replica.plain_engine.name == "unsloth"
    assert same(update(run, 4), expected)
    run.close_observers()


def test_a_checkpoint_of_unsloth_goes_on_in_the_reference(wide_run, references):
    """In a process of its own: unsloth has patched this one."""
    first, expected = saved_at_3(wide_run, "unsloth")
    folder = Path(first.folder)
    command = [
        sys.executable,
        str(ROOT / "train_loop.py"),
        "--resume",
        str(folder),
        "execution.engine=peft",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert same(SimpleNamespace(**[line for line in lines if line["update"] == 4][-1]), expected)


def test_answers_between_updates_leave_recomputation_and_views_as_they_were(wide_run):
    from glassloop.loop.generation import EvaluationSetup, generate

    run = wide_run("unsloth")
    update(run, 1)
    decoder = run.replica.plain_engine.hf.get_base_model().get_decoder()
    before = [
        bool(getattr(module, "gradient_checkpointing", False)) for module in decoder.modules()
    ]
    assert any(before)
    setup = EvaluationSetup(
        template=run.template,
        tokenizer=run.tokenizer,
        stop_ids=(2,),
        pad_id=0,
        batch_size=2,
        max_new_tokens=8,
        device=run.replica.device,
        autocast=run.accelerator.autocast,
    )
    answers = generate(run.replica.plain_engine.hf, [[1, 5, 9], [1, 7]], setup)
    assert all(answers)
    update(run, 2)
    assert [
        bool(getattr(module, "gradient_checkpointing", False)) for module in decoder.modules()
    ] == before
    run.replica.adapters.check_views()


def test_the_loss_falls(wide_run):
    run = wide_run("unsloth")
    losses = [update(run, u).loss_nats for u in range(1, 31)]
    run.replica.adapters.check_views()
    assert losses[-1] < losses[0] - 0.5
