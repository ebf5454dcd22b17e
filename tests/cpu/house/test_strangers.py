"""Strangers agree.

A plain loop, transformers' Trainer and TRL's SFTTrainer, given the same rows in the same order, do
the same updates.

strangers.py has the four of them and the problem: a Llama in fp32 without quantisation, LoRA on all
seven projections, AdamW with 32-bit states and weight decay, a constant learning rate, clipping at
1, 2 rows x 2 micro-batches an update, ten updates.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from launching import environment, run
from transformers import get_scheduler

from glassloop.plan.steps import make_plan

SCRIPT = Path(__file__).resolve().parents[2] / "helpers" / "strangers.py"


def train(folder: Path, model: Path, *names: str, **env: str) -> None:
    """Run the named ones in a process of their own: trainers keep global state, and TRL patches."""
    command = [sys.executable, str(SCRIPT), str(folder), str(model), *names]
    done = run(command, env=environment(CUDA_VISIBLE_DEVICES="", **env))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Folder with the problem and glassloop's ten updates."""
    folder = tmp_path_factory.mktemp("strangers")
    train(folder, tiny_llama, "glassloop")
    return folder


@pytest.fixture(scope="module")
def _plain_and_transformers(folder: Path, tiny_llama: Path) -> None:
    train(folder, tiny_llama, "plain", "transformers")


@pytest.fixture(scope="module", params=["plain", "transformers", "trl"])
def stranger(request: pytest.FixtureRequest, folder: Path, tiny_llama: Path) -> str:
    """Name of one that has trained the same problem."""
    if request.param != "trl":
        request.getfixturevalue("_plain_and_transformers")
        return request.param
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install 'glassloop[test]' brings it")
    train(
        folder, tiny_llama, "trl", TRITON_INTERPRET="1"
    )  # TRL 1.15 computes by Triton on a CPU too
    return request.param


def updates(folder: Path, name: str) -> list[dict[str, float]]:
    found = json.loads((folder / f"{name}.json").read_text())
    assert len(found) == 10
    return found


def off(folder: Path, stranger: str, what: str) -> list[float]:
    """By how much glassloop's number of each update differs from the stranger's, relative to it."""
    both = zip(updates(folder, "glassloop"), updates(folder, stranger), strict=True)
    return [abs(mine[what] - theirs[what]) / theirs[what] for mine, theirs in both]


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_the_first_update_is_a_strangers(folder: Path, stranger: str, what: str) -> None:
    assert off(folder, stranger, what)[0] <= 1e-5


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_the_next_nine_updates_are_a_strangers(folder: Path, stranger: str, what: str) -> None:
    assert max(off(folder, stranger, what)[1:]) <= 1e-4


def test_ten_updates_change_the_adapters_as_a_strangers_do(folder: Path, stranger: str) -> None:
    def adapters(name: str) -> torch.Tensor:
        saved = safetensors.torch.load_file(folder / f"{name}.safetensors")
        return torch.cat([saved[key].double().flatten() for key in sorted(saved)])

    change = adapters("glassloop") - adapters("start")
    assert change.norm() > 1
    assert (adapters("glassloop") - adapters(stranger)).norm() / change.norm() <= 1e-4


def test_the_problem_leaves_no_easy_way_to_agree(folder: Path) -> None:
    rows = json.loads((folder / "problem.json").read_text())
    labels = [sum(label != -100 for label in row["labels"]) for row in rows]
    micro_batches = [labels[start : start + 2] for start in range(0, len(rows), 2)]
    assert len(rows) % 4 == 3  # a tail, and a micro-batch of one row in it
    assert all(
        len({len(row["input_ids"]) for row in rows[start : start + 4]}) > 1
        for start in range(0, len(rows), 4)
    )
    assert all(row["labels"][0] == -100 for row in rows)  # prompts carry no loss
    assert [
        0,
        0,
    ] in micro_batches and 1 in labels  # a micro-batch without a label, and a row with a single one
    assert any(
        sum(one) > 3 * sum(two)
        for one, two in zip(micro_batches[::2], micro_batches[1::2], strict=False)
    )
    clipped = [update["clip"] < 1 for update in updates(folder, "glassloop")]
    assert any(clipped) and not all(clipped)
    norms = [
        value.norm().item()
        for value in safetensors.torch.load_file(folder / "start.safetensors").values()
    ]
    assert (
        len(norms) == 2 * 7 * 2 and min(norms) > 0
    )  # A and B of seven projections of two layers: all have a gradient


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")],
)
def test_a_schedule_that_starts_at_zero_is_the_trainers(kind: str, theirs: str) -> None:
    counts = {
        "rows": 600,
        "size": 2,
        "ranks": 2,
        "accumulation": 4,
        "tail": "keep",
        "updates": 60,
        "epochs": 1.0,
    }
    mine = make_plan(**counts, warmup=5, peak=2e-4, kind=kind, first="zero").lr
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=5, num_training_steps=60)
    applied = []
    for _ in range(60):
        applied.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert mine[0] == 0 and mine == pytest.approx(applied, rel=1e-12, abs=0)
