"""Damaged and malformed capsules are refused with the file and the cure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capsules import NAMES, parts, save
from torch import nn

from glassloop.formula.optim import FlatAdapters
from glassloop.saved.capsule import (
    read_capsule,
    read_facts,
    restore_capsule,
)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change capsule.json and put its sum right, as someone would who wants it to be read."""
    plain = json.loads((path / "capsule.json").read_text())
    change(plain)
    (path / "capsule.json").write_text(json.dumps(plain))
    signed(path)


def signed(path: Path, extra: str = "") -> None:
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(path.iterdir())
        if file.name != "SHA256SUMS"
    ]
    (path / "SHA256SUMS").write_text("".join(lines) + extra)


MALFORMED = {
    "no schema": (lambda p: p.pop("schema"), "says no schema"),
    "a newer schema": (lambda p: p.update(schema=99), "install a newer one"),
    "an unknown field": (lambda p: p.update(shell="rm"), "missing or unknown: shell"),
    "a missing field": (lambda p: p.pop("lr"), "missing or unknown: lr"),
    "a negative update": (
        lambda p: p.update(update=-1),
        "update is -1, not a whole number of at least 1",
    ),
    "true for a number": (lambda p: p.update(world_size=True), "world_size is True"),
    "an infinite lr": (lambda p: p.update(lr=math.inf), "Infinity is no JSON number"),
    "a loss scale of 0": (
        lambda p: p.update(loss_scale=0),
        "loss_scale is 0, not a number above 0",
    ),
    "passes of another number of ranks": (
        lambda p: p.update(passes=p["passes"][:1]),
        "passes of 1 ranks, world_size is 2",
    ),
    "a row twice": (lambda p: p["passes"][0].append([17]), "do not hold each of its rows once"),
    "a row that is not there": (
        lambda p: p["passes"][1][0].append(5),
        "do not hold each of its rows once",
    ),
    "an empty pass": (lambda p: p["passes"][1].append([]), "passes is"),
    "a huge token id": (
        lambda p: p["rows"][0]["input_ids"].__setitem__(0, 2**40),
        "no sound row_id",
    ),
    "runs of another length": (
        lambda p: p["rows"][0]["supervised_runs"].append(3),
        "no sound row_id",
    ),
    "a changed token": (
        lambda p: p["rows"][0]["input_ids"].__setitem__(1, 7),
        "does not have its digest",
    ),
    "tokens of one row gone": (
        lambda p: [p["rows"][0].pop(name) for name in ("row_id", "input_ids", "supervised_runs")],
        "only 2 of 3 rows carry tokens",
    ),
    "a text for a loss": (lambda p: p["expected"].update(loss_nats="much"), "expected: "),
    "losses of another rank": (
        lambda p: p["expected"]["rank_loss_sums"].append(1.0),
        "one number for each rank and row",
    ),
    "losses of another row": (
        lambda p: p["expected"]["row_loss_sums"][0].append(1.0),
        "one number for each rank and row",
    ),
}


@pytest.mark.parametrize(("change", "complaint"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_refused_with_file_value_and_cure(tmp_path, change, complaint):
    path = save(tmp_path).path
    assert path is not None
    rewritten(path, change)
    for read in (read_facts, read_capsule):
        with pytest.raises(
            ValueError, match=r"cannot be read: capsule\.json .*Take another capsule"
        ) as caught:
            read(path)
        assert complaint in str(caught.value)


def test_what_is_not_json_or_not_a_tensor_file_is_refused(tmp_path):
    path = save(tmp_path).path
    assert path is not None
    for name, complaint in (
        ("capsule.json", "capsule.json is malformed"),
        ("optimizer.safetensors", "optimizer.safetensors is malformed"),
    ):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(b"\x80\x04cos\nsystem\n" + whole)  # the first bytes of a pickle
        signed(path)
        with pytest.raises(ValueError, match=complaint):
            read_capsule(path)
        (path / name).write_bytes(whole)
        signed(path)


DAMAGE = {
    "missing": None,
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one bit flipped": lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
    "longer": lambda data: data + b" ",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_any_file_is_noticed_and_named(tmp_path, damage):
    path = save(tmp_path).path
    assert path is not None
    files = sorted(path.iterdir())
    assert len(files) == 7  # adapter, optimizer twice, random numbers of two ranks, facts, sums
    for file in files:
        data = file.read_bytes()
        file.unlink()
        if damage is not None:
            file.write_bytes(damage(data))
        with pytest.raises(ValueError, match=rf"cannot be read: .*{file.name.replace('.', '[.]')}"):
            read_capsule(path)
        file.write_bytes(data)
    read_capsule(path)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", ".hidden", "sub/file"])
def test_no_name_in_it_leads_out_of_its_folder(tmp_path, name):
    path = save(tmp_path).path
    assert path is not None
    (tmp_path / "outside.json").write_text("{}")
    signed(path, f"{hashlib.sha256(b'{}').hexdigest()}  {name}\n")
    with pytest.raises(ValueError, match="SHA256SUMS is corrupt"):
        read_capsule(path)


def test_a_link_is_not_followed(tmp_path):
    path = save(tmp_path).path
    assert path is not None
    outside = tmp_path / "outside.json"
    (path / "rng_rank1.json").rename(outside)
    (path / "rng_rank1.json").symlink_to(outside)
    with pytest.raises(ValueError, match="is a link, not a plain file"):
        read_capsule(path)


def test_a_rank_without_random_numbers_is_refused(tmp_path):
    path = save(tmp_path).path
    assert path is not None
    (path / "rng_rank1.json").unlink()
    signed(path)
    with pytest.raises(ValueError, match=r"does not list rng_rank1\.json"):
        read_capsule(path)


def test_another_model_or_optimizer_is_refused_and_left_as_it_is(tmp_path):
    path = save(tmp_path).path
    assert path is not None
    capsule = read_capsule(path)
    adapters, optimizer = parts(seed=3, optimizer="adamw")
    before = adapters.flat.detach().clone()
    with pytest.raises(
        ValueError, match="does not fit this model: the optimizer state has optimizer = 'AdamW8bit'"
    ):
        restore_capsule(capsule, adapters=adapters, optimizer=optimizer)
    assert torch.equal(adapters.flat.detach(), before)
    fewer = FlatAdapters([(NAMES[0], nn.Parameter(torch.zeros(8, 300)))])
    with pytest.raises(ValueError, match="do not have the same matrices"):
        restore_capsule(capsule, adapters=fewer, optimizer=optimizer)
