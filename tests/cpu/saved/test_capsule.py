"""A capsule is whole or not there, brings back every bit, stays under its caps, and nothing in it
can lead elsewhere."""

from __future__ import annotations

import dataclasses
import errno
import random
from pathlib import Path

import pytest
import torch
from capsules import CPU, ROWS, facts, names, parts, save

from glassloop.disk import publish as folders
from glassloop.saved.capsule import (
    CapsuleNotSaved,
    read_capsule,
    read_facts,
    restore_capsule,
    row_digest,
    save_capsule,
)
from glassloop.saved.state import rng_state


def test_a_capsule_brings_back_adapters_optimizer_and_random_numbers_bit_for_bit(tmp_path):
    adapters, optimizer = parts()
    flat = adapters.flat.detach().clone()
    state = {
        k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[adapters.flat].items()
    }
    random.seed(5)
    before = rng_state(CPU)
    saved = save_capsule(
        tmp_path,
        facts(),
        text="ids",
        adapters=adapters,
        optimizer=optimizer,
        rng_states=[before, before],
        keep=4,
        most_gib=1,
    )
    assert saved.path == tmp_path / "update_000037"
    other, its_optimizer = parts(seed=9)
    capsule = read_capsule(saved.path)
    restore_capsule(capsule, adapters=other, optimizer=its_optimizer)
    for name, place in adapters.slices.items():
        assert torch.equal(place.of(flat), other.slices[name].of(other.flat.detach()))
    now = its_optimizer.state[other.flat]
    assert now.keys() == state.keys()
    assert all(
        torch.equal(now[k], v) if torch.is_tensor(v) else now[k] == v for k, v in state.items()
    )
    assert capsule.rng_states == (before, before)


def test_its_facts_come_back_with_infinite_numbers_and_nan(tmp_path):
    path = save(tmp_path).path
    assert path is not None
    read = read_facts(path)
    digests = {number: row_digest(row) for number, row in ROWS.items()}
    wanted = dataclasses.replace(facts(), rows=ROWS, digests=digests, serial=1)
    plain = [
        repr(dataclasses.asdict(one)) for one in (read, wanted)
    ]  # repr: NaN is not equal to itself
    assert plain[0] == plain[1]


def test_without_text_it_holds_no_id_and_no_token_of_a_row(tmp_path):
    path = save(tmp_path, text="none").path
    assert path is not None
    written = (path / "capsule.json").read_text()
    assert "train:" not in written
    assert "input_ids" not in written
    assert read_facts(path).rows == {}
    assert read_facts(path).digests[17] == row_digest(ROWS[17])


def test_a_full_disk_publishes_nothing_removes_nothing_and_says_so(tmp_path, monkeypatch):
    save(tmp_path, facts(1))

    def full(path: Path, data: bytes) -> None:
        if path.name == "capsule.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr(folders, "_write", full)
    with pytest.raises(
        CapsuleNotSaved,
        match=r"update_000002 was not saved: .*No space left.*lower record\.capsules",
    ):
        save(tmp_path, facts(2), keep=1)
    assert names(tmp_path) == ["update_000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["update_000001"]


def test_the_same_update_once_more_takes_the_place_of_the_first(tmp_path):
    save(tmp_path, facts(attempt=1))
    save(tmp_path, facts(attempt=2))
    assert [path.name for path in tmp_path.iterdir()] == ["update_000037"]
    assert read_facts(tmp_path / "update_000037").attempt == 2


def test_room_goes_to_the_newest_bad_one_and_the_healthy_one_first(tmp_path):
    for update, why in (
        (1, "norm_spike"),
        (6, "healthy"),
        (8, "asked"),
        (9, "loss_spike"),
        (12, "nonfinite"),
    ):
        saved = save(tmp_path, facts(update, why), keep=3)
    assert names(tmp_path) == ["update_000006", "update_000008", "update_000012"]
    assert [path.name for path in saved.removed] == ["update_000009"]
    save(tmp_path, facts(13, "nonfinite"), keep=2)
    assert names(tmp_path) == ["update_000006", "update_000013"]


def test_one_that_has_no_room_is_not_written_and_says_why(tmp_path):
    save(tmp_path, facts(6, "healthy"), keep=2)
    save(tmp_path, facts(7, "nonfinite"), keep=2)
    saved = save(tmp_path, facts(8, "asked"), keep=2)
    assert saved.path is None
    assert "update 8 (asked" in str(saved.note)
    assert "record.capsules = 2" in str(saved.note)
    assert "update_000007, update_000006" in str(saved.note)
    assert names(tmp_path) == ["update_000006", "update_000007"]


def test_size_is_capped_over_all_capsules(tmp_path):
    save(tmp_path, facts(6, "healthy"))
    size = sum(file.stat().st_size for file in (tmp_path / "update_000006").iterdir())
    for update in (7, 8, 9):
        save(tmp_path, facts(update, "nonfinite"), most_gib=2.5 * size / 2**30)
    assert names(tmp_path) == ["update_000006", "update_000009"]
    assert save(tmp_path, facts(10, "nonfinite"), most_gib=0.5 * size / 2**30).path is None
