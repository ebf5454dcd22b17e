"""A capsule is whole or not there, brings back every bit, stays under its caps, and nothing in it
can lead elsewhere."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glassloop.data.rows import Row
from glassloop.disk import publish as folders
from glassloop.formula.optim import FlatAdapters, make_optimizer
from glassloop.saved.capsule import (
    CapsuleFacts,
    CapsuleNotSaved,
    CapsuleSaved,
    Expected,
    find_capsules,
    read_capsule,
    read_facts,
    restore_capsule,
    row_digest,
    save_capsule,
)
from glassloop.saved.state import rng_state

CPU = torch.device("cpu")
NAMES = [
    f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{s}.default.weight"
    for i in (0, 1)
    for s in "AB"
]
ROWS = {
    17: Row("train:17", (1, 40, 41, 42), (False, False, True, True)),
    3: Row("train:3", (1, 50, 51), (False, True, False)),
    4: Row("train:4", (1, 60), (False, False)),
}


def parts(
    seed: int = 0, optimizer: str = "adamw_8bit"
) -> tuple[FlatAdapters, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    adapters = FlatAdapters(
        (name, nn.Parameter(torch.randn(8, 300, generator=generator))) for name in NAMES
    )
    moved = make_optimizer(
        optimizer, adapters.flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    adapters.grad.copy_(torch.randn(adapters.grad.shape, generator=generator))
    moved.step()
    return adapters, moved


def facts(update: int = 37, why: str = "norm_spike", **changed: Any) -> CapsuleFacts:
    expected = Expected(2.5, math.inf, (5.0, math.nan), (1.0, 2.0), ((3.0, 2.0), (math.nan,)))
    values = dict(
        update=update,
        epoch=0,
        attempt=1,
        why=why,
        world_size=2,
        lr=1e-4,
        supervised_tokens=3,
        loss_scale=1.0,
        finite_updates=0,
        max_grad_norm=None,
        packed=False,
        pad_id=0,
        base_hash="ab" * 32,
        config={"seed": 1, "model": {"id": "x"}},
        versions={"torch": "2"},
        passes=(((17,), (3,)), ((4,),)),
        rows=ROWS,
        expected=expected,
    )
    return CapsuleFacts(**{**values, **changed})  # type: ignore[arg-type]


def save(
    folder: Path,
    of: CapsuleFacts | None = None,
    *,
    text: str = "ids",
    keep: int = 4,
    most_gib: float = 1.0,
    seed: int = 0,
) -> CapsuleSaved:
    adapters, optimizer = parts(seed)
    return save_capsule(
        folder,
        of or facts(),
        text=text,
        adapters=adapters,
        optimizer=optimizer,
        rng_states=[rng_state(CPU)] * 2,
        keep=keep,
        most_gib=most_gib,
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in find_capsules(folder)]


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
