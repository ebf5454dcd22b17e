"""Damaged and forged checkpoints are refused by the name of the file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Bench, forge, load, refused, resum, without

from glassloop.disk import publish as folders
from glassloop.saved import checkpoint
from glassloop.saved.checkpoint import (
    last_checkpoint,
)

# What is refused


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit flipped": flip,
    "longer": lambda data: data + b" ",
}
FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "optimizer.json",
    "state.json",
]
FILES += [
    "rng_rank0.json",
    "rng_rank1.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "SHA256SUMS",
]
PARSED = [
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "state.json",
    "rng_rank1.json",
]


def test_the_files_of_a_checkpoint_are_those_that_are_damaged_here(at_40: Path) -> None:
    assert sorted(FILES) == sorted(path.name for path in at_40.iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(
    name: str, damage: str, at_40: Path, other: Bench, run: Path
) -> None:
    data = DAMAGE[damage]((at_40 / name).read_bytes())
    (at_40 / name).unlink()
    if data is not None:
        (at_40 / name).write_bytes(data)
    assert name in refused(at_40, other)
    found, notes = last_checkpoint(run)
    assert found == run / "checkpoints/update_000020"
    assert len(notes) == 1
    assert str(at_40) in notes[0]
    assert name in notes[0]


def test_sums_cut_at_any_line_are_refused(at_40: Path, other: Bench) -> None:
    lines = (at_40 / "SHA256SUMS").read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        (at_40 / "SHA256SUMS").write_text("".join(lines[:count]))
        assert "SHA256SUMS is " in (message := refused(at_40, other))
        assert "cut short" in message


def test_any_flipped_byte_is_refused(at_40: Path) -> None:
    draw = random.Random(7)
    for _ in range(150):
        path = draw.choice(sorted(at_40.iterdir()))
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(
            data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]
        )
        with pytest.raises(ValueError, match=r"corrupt|cut short|missing"):
            folders.read(at_40, checkpoint.REQUIRED)
        path.write_bytes(data)
    folders.read(at_40, checkpoint.REQUIRED)


LONG = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FORGED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a list for a state": ("state.json", lambda s: [s], "no schema"),
    "a newer schema": ("state.json", lambda s: s | {"schema": 99}, "schema 99"),
    "a field missing": ("state.json", lambda s: without(s, "base_hash"), "base_hash"),
    "a field unknown": ("state.json", lambda s: s | {"spell": 1}, "spell"),
    "a field of a wrong type": ("state.json", lambda s: s | {"update": "40"}, "update is '40'"),
    "a list of nothing for a map": ("state.json", lambda s: s | {"config": []}, "config is []"),
    "null where a value must be": (
        "state.json",
        lambda s: s | {"attempt": None},
        "attempt is None",
    ),
    "another optimizer": ("optimizer.json", lambda s: s | {"optimizer": "AdamW"}, "AdamW"),
    "another size": ("optimizer.json", lambda s: s | {"elements": 5}, "elements = 5"),
    "no values": ("optimizer.json", lambda s: without(s, "values"), "holds no values"),
    "no count of steps": ("optimizer.json", lambda s: s | {"values": {}}, "step is None"),
    "no list": ("optimizer.json", lambda s: [], "holds no values"),
    "a moment missing": ("optimizer.safetensors", lambda s: without(s, "state2"), "state2"),
    "a moment cut": (
        "optimizer.safetensors",
        lambda s: s | {"state1": s["state1"][:-256].clone()},
        "state1",
    ),
    "a moment cast": (
        "optimizer.safetensors",
        lambda s: s | {"absmax1": s["absmax1"].half()},
        "absmax1",
    ),
    "a matrix missing": ("adapter_model.safetensors", lambda s: without(s, LONG), LONG),
    "a matrix too many": (
        "adapter_model.safetensors",
        lambda s: s | {"lm_head": torch.ones(3)},
        "lm_head",
    ),
    "a matrix turned": (
        "adapter_model.safetensors",
        lambda s: s | {LONG: s[LONG].T.contiguous()},
        LONG,
    ),
    "a matrix cast": (
        "adapter_model.safetensors",
        lambda s: s | {LONG: s[LONG].bfloat16()},
        "bfloat16",
    ),
    "no python state": ("rng_rank1.json", lambda s: without(s, "python"), "rng_rank1.json"),
    "a short python state": (
        "rng_rank1.json",
        lambda s: s | {"python": [3, [1, 2], None]},
        "rng_rank1.json",
    ),
    "a numpy state of another kind": (
        "rng_rank1.json",
        lambda s: s | {"numpy": ["PCG64", [], 1, 0, 0.0]},
        "rng_rank1.json",
    ),
    "a short torch state": ("rng_rank1.json", lambda s: s | {"torch": "00ff"}, "rng_rank1.json"),
    "a torch state that is no hex": (
        "rng_rank1.json",
        lambda s: s | {"torch": "zz"},
        "rng_rank1.json",
    ),
    "a GPU's numbers": ("rng_rank1.json", lambda s: s | {"cuda": "00" * 16}, "a run on cuda"),
}


@pytest.mark.parametrize(("name", "change", "complaint"), FORGED.values(), ids=FORGED)
def test_a_forged_file_is_refused(
    name: str, change: Callable[[Any], Any], complaint: str, at_40: Path, other: Bench
) -> None:
    forge(at_40, name, change)
    message = refused(at_40, other)
    assert complaint in message
    assert name.partition(".")[0] in message or "optimizer state" in message


@pytest.mark.parametrize("name", PARSED)
@pytest.mark.parametrize("junk", [b"\x80\x04junk", b"", b"[" * 100_000, b'{"a": NaN', b"\xff\xfe"])
def test_junk_with_a_right_sum_is_refused(
    name: str, junk: bytes, at_40: Path, other: Bench
) -> None:
    (at_40 / name).write_bytes(junk)
    resum(at_40, name)
    assert name in refused(at_40, other)


@pytest.mark.parametrize(
    "name", ["../state.json", "/etc/passwd", "..", "a/b", ".hidden", "a\\b", "", "state.json"]
)
def test_a_name_in_the_sums_cannot_leave_the_folder_or_come_twice(
    name: str, at_40: Path, other: Bench
) -> None:
    with open(at_40 / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    assert "SHA256SUMS is corrupt at" in refused(at_40, other)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_link_or_a_folder_in_place_of_a_file_is_refused(
    kind: str, at_40: Path, other: Bench, tmp_path: Path
) -> None:
    (at_40 / "state.json").rename(tmp_path / "elsewhere.json")
    if kind == "link":
        (at_40 / "state.json").symlink_to(tmp_path / "elsewhere.json")
    else:
        (at_40 / "state.json").mkdir()
    assert "not a plain file: it was not followed" in refused(at_40, other)


def test_files_that_are_not_listed_are_left_alone(at_40: Path, scratch: Bench) -> None:
    (at_40 / "notes.txt").write_text("mine")
    load(at_40, scratch)
