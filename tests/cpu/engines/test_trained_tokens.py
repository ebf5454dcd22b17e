"""Tokens whose embedding trains whole: lora.trainable_token_indices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from family_models import passes
from peft import PeftModel
from resumed_runs import resumed
from safetensors.torch import load_file
from trained_runs import finished_run
from transformers import AutoModelForCausalLM

from glassloop.cli.__main__ import main
from glassloop.cli.plan import main as plan
from glassloop.config import LoraConfig
from glassloop.config.arguments import ConfigError, parse
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters
from glassloop.use.loaded import load
from glassloop.use.trained import adapter_weights, open_trained
from train_loop import train

ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
IDS = (17, 4)  # not in order: row 0 is token 17
LORA = LoraConfig(r=4, alpha=8, targets=("q_proj",), trainable_token_indices=IDS)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_loss_and_the_rows_gradient_are_those_of_an_embedding_that_trains(
    engine_of, request: pytest.FixtureRequest, model: str
) -> None:
    """The Qwen2's head is its embedding: a row's gradient comes from both."""
    folder: Path = request.getfixturevalue(model)
    engine = engine_of(folder, lora=LORA)
    adapters = FlatAdapters(engine.hf.named_parameters())
    place = adapters.slices[f"{ROW}.default"]
    assert place.shape == (2, 64) and adapters.trainable == 2 * 64 + 2 * 4 * (64 + 64)
    torch.manual_seed(1)
    place.of(adapters.flat.data).add_(torch.randn(2, 64) * 0.1)
    ids = torch.tensor([[17, 9, 4, 17, 300, 4]])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = plain.get_input_embeddings().weight
    whole.data[list(IDS)] = place.of(adapters.flat.data)
    wanted = F.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    wanted.backward()
    row = Row("r", tuple(ids[0].tolist()), (False, *(True,) * 5))
    for packed in (False, True):
        adapters.zero_grad()
        found, _ = engine(build_pass([row], packed=packed, pad_id=0, device=ids.device))
        (found / 3).backward()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
        ours, theirs = place.of(adapters.grad), whole.grad[list(IDS)] / 3
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_they_train_in_fp32_beside_a_base_of_16_bits(engine_of, tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama, lora=LORA, precision="bf16")
    trained = {name: p.dtype for name, p in engine.hf.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and f"{ROW}.default" in trained


def test_a_pass_without_a_label_gives_no_gradient(engine_of, tiny_qwen2: Path) -> None:
    engine = engine_of(tiny_qwen2, lora=LORA)
    adapters = FlatAdapters(engine.hf.named_parameters())
    rows = [Row("r", (5, 6, 7), (False,) * 3)]
    found, _ = engine(build_pass(rows, packed=False, pad_id=0, device=torch.device("cpu")))
    found.backward()
    assert found.item() == 0 and not adapters.grad.any()


def test_the_base_alone_has_its_own_head(engine_of, tiny_qwen2: Path) -> None:
    engine = engine_of(tiny_qwen2, lora=LORA)
    p = passes(packed=False)
    assert "token_adapter" not in " ".join(engine.report.notes)
    before = engine(p)[0].item()
    FlatAdapters(engine.hf.named_parameters()).flat.data.add_(1)
    assert engine(p)[0].item() != pytest.approx(before)
    with engine.hf.disable_adapter():
        assert engine(p)[0].item() == before


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    model = request.getfixturevalue(request.param)
    return finished_run(
        tmp_path_factory.mktemp("tokens"), model, lora={"trainable_token_indices": list(IDS)}
    )


def test_a_run_counts_says_and_saves_them_in_peft_s_format(run: Path) -> None:
    facts = json.loads((run / "plan.json").read_text())["contract"]
    trained = open_trained(run)
    weights = adapter_weights(trained)
    assert facts["trainable parameters"] == sum(one.numel() for one in weights.values())
    plain = AutoModelForCausalLM.from_pretrained(trained.config.model.id, dtype=torch.float32)
    before = plain.get_input_embeddings().weight[list(IDS)].detach().clone()
    assert weights[ROW].dtype == torch.float32 and not torch.equal(weights[ROW], before)
    stranger = PeftModel.from_pretrained(plain, str(trained.checkpoint))
    theirs = dict(stranger.named_parameters())[f"{ROW}.default"]
    torch.testing.assert_close(theirs, weights[ROW], rtol=0, atol=0)
    ours = load(trained, torch.device("cpu")).engine.hf
    found = dict(ours.named_parameters())[f"{ROW}.default"]
    assert torch.equal(found, weights[ROW])


def test_it_resumes_bit_for_bit(run_of) -> None:
    """Update 2 from the checkpoint after update 1 is update 2 of the run in one go."""
    run = run_of(
        lora={"trainable_token_indices": list(IDS), "rank_pattern": {"k_proj": 19}},
        schedule={"updates": 2, "warmup_updates": 0},
        checkpoint={"every_updates": 1},
        execution={"precision": "fp32", "deterministic": True},
    )
    assert train(run) == 0
    run.close()
    again = resumed(run.folder, "resume.at=1", start=False, close=False)
    before = again.replica.adapters.flat.detach().clone()
    assert train(again) == 0
    again.close()
    ended = again.replica.adapters.flat.detach()
    assert torch.equal(ended, run.replica.adapters.flat.detach())
    moved = again.replica.adapters.slices[f"{ROW}.default"].of(ended - before)
    assert moved.abs().max() > 0


def test_a_merge_has_the_rows_in_their_places(run: Path, tmp_path: Path) -> None:
    assert main(["merge", str(run), str(tmp_path / "out"), "--base", "original", "--no-table"]) == 0
    trained = open_trained(run)
    base = load_file(next(Path(trained.config.model.id).glob("*.safetensors")))
    found = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    wanted = base["model.embed_tokens.weight"].clone()
    wanted[list(IDS)] = adapter_weights(trained)[ROW].bfloat16()
    assert torch.equal(found, wanted)
    assert "vLLM serves no adapter with trained tokens" in (tmp_path / "out/SERVE.txt").read_text()


def test_what_cannot_be_is_refused_before_a_weight_is_read(
    run_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("glassloop.engines.build.load_base", fail)
    for engine in ("fused", "unsloth"):
        with pytest.raises(ConfigError, match=rf"{engine} and lora\.trainable_token_indices = 3,4"):
            parse(["lora.trainable_token_indices=3,4", f"execution.engine={engine}"])
    for words, said in (("3,3", "has 3 twice"), ("-1", "greater than or equal to 0")):
        with pytest.raises(ConfigError, match=said):
            parse([f"lora.trainable_token_indices={words}"])
    with pytest.raises(ValueError, match=r"indices = 512: the embedding has 512 rows"):
        run_of(lora={"trainable_token_indices": [512]})


def test_the_plan_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.id=random:tiny", "lora.targets=q_proj", "lora.r=4", "data.source=scam"]
    assert plan([*words, "lora.trainable_token_indices=3,4,5", "--rows", "40"]) == 0
    said = capsys.readouterr().out
    assert f"{2 * 4 * (64 + 64) + 3 * 64:,} parameters" in said
    assert "and the embedding of 3 tokens" in said


def test_an_adapter_to_begin_from_must_have_the_same(engine_of, tiny_llama, tmp_path) -> None:
    engine_of(tiny_llama, lora=LORA).hf.save_pretrained(tmp_path, save_embedding_layers=False)
    engine = engine_of(tiny_llama, lora=LORA, init_adapter=str(tmp_path))
    assert engine(passes(packed=False))[0].isfinite()
    for other in ((), (4, 17)):
        changed = LORA.model_copy(update={"trainable_token_indices": other})
        with pytest.raises(ValueError, match=r"lora\.trainable_token_indices is \[17, 4\] in the"):
            engine_of(tiny_llama, lora=changed, init_adapter=str(tmp_path))
