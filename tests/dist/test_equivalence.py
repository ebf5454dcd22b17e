"""How an update is laid out may not change its gradient: micro-batches, ranks, padding, packing, recomputation, reduction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from launching import HERE, environment, launch, write_rows
from members import ONE_RANK, REFERENCE, ROWS, TWO_RANKS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("equivalence")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    arguments = [str(folder), str(tiny_llama), str(rows)]
    one = subprocess.run([sys.executable, HERE / "members.py", *arguments], env=environment(), capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stdout[-3000:] + one.stderr[-3000:]
    launch(HERE / "members.py", *arguments)
    return folder


def distance(results: Path, member: str, what: str) -> float:
    """L2 distance to the reference member, relative to the reference."""
    mine, reference = (safetensors.torch.load_file(results / f"{name}.safetensors")[what].double() for name in (member, REFERENCE))
    assert reference.norm() > 1e-3
    return ((mine - reference).norm() / reference.norm()).item()


MEMBERS = [name for name in {**ONE_RANK, **TWO_RANKS} if name != REFERENCE]


@pytest.mark.parametrize("member", MEMBERS)
def test_the_gradient_at_equal_weights_is_the_same(results, member):
    assert distance(results, member, "grad") <= 1e-6


@pytest.mark.parametrize("member", MEMBERS)
def test_five_updates_of_sgd_end_in_the_same_place(results, member):
    assert distance(results, member, "sgd") <= 2e-6


@pytest.mark.parametrize("member", MEMBERS)
def test_five_updates_of_8_bit_adamw_make_the_same_change(results, member):
    assert distance(results, member, "adamw_8bit") <= 1e-3
