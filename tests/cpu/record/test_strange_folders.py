"""A stranger's run: nothing is followed, hangs or is obeyed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_runs import BOMB
from made_runs import write_run
from strange_folders import copied, read_everything, shown, spoil

from glassloop.cli.__main__ import main
from glassloop.config.arguments import ConfigError, parse
from glassloop.disk.opening import NotPlain, require_plain_entries
from glassloop.disk.publish import NotSaved, publish, read, sweep
from glassloop.record.jsonl import KINDS, mend, read_records
from glassloop.record.observers import JsonlObserver
from glassloop.record.reading import read_run
from glassloop.report.compare_text import render
from glassloop.report.comparing import compare
from glassloop.report.following import Watched
from glassloop.report.watching import Screen

pytestmark = pytest.mark.timeout(60)  # what hangs here would hang for ever


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("strange") / "whole", updates=12, layers=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("strange") / "other", updates=8, layers=1, seed=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return copied(whole, tmp_path / "run")


def as_link(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def as_terabyte(path: Path) -> None:
    os.truncate(path, 2**40)


def as_long_line(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(file.tell() + 65 * 2**20)


WHOLE_FILES = ("config.yaml", "plan.json", "env.json")
SPOILED = {
    "a link": (as_link, "is a link, not a plain file"),
    "a FIFO": (as_fifo, "is a FIFO, not a plain file"),
    "a link to zeros without end": (as_zeros, "is a link, not a plain file"),
    "a folder": (as_folder, "is a folder, not a plain file"),
    "a socket": (as_socket, "is a socket, not a plain file"),
    "a terabyte": (as_terabyte, "at most|more than 4 GiB"),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("name", [*KINDS, *WHOLE_FILES])
def test_no_file_of_a_run_is_read_but_a_plain_one(folder: Path, name: str, kind: str) -> None:
    make, told = SPOILED[kind]
    make(folder / name)
    with pytest.raises(ValueError, match=told) as refused:
        read_run(folder)
    assert str(folder / name) in str(refused.value)


def look_at(watched: Watched) -> str:
    watched.refresh()
    return shown(Screen(watched))


@pytest.mark.parametrize("kind", SPOILED)
def test_the_live_view_follows_nothing_either(folder: Path, kind: str) -> None:
    make, told = SPOILED[kind]
    (folder / "ranks").mkdir()
    (folder / "ranks/rank0.json").write_text("{}")
    for name in ("metrics.jsonl", "events.jsonl", "ranks/rank0.json"):
        spoiled = copied(folder, folder.parent / "spoiled")
        if name.startswith("ranks"):  # shown while a run goes
            lines = (spoiled / "events.jsonl").read_text().splitlines()
            (spoiled / "events.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        make(spoiled / name)
        watched = Watched(spoiled)
        with pytest.raises(ValueError, match=rf"{told}|longer than 64 MiB"):
            look_at(watched)


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_writes_through_no_link(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside-{name}"
    as_link(folder / name)
    before = outside.read_bytes()
    with pytest.raises(NotPlain, match=f"{name} is a link"):
        JsonlObserver(folder, "ids")
    assert outside.read_bytes() == before
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "not-there-yet")
    with pytest.raises(NotPlain, match=f"{name} is a link"):
        JsonlObserver(folder, "ids")
    assert not (folder.parent / "not-there-yet").exists()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_has_another_name_elsewhere_is_read_but_not_written(
    folder: Path, name: str
) -> None:
    outside = folder.parent / f"outside-{name}"
    for path in map(folder.joinpath, KINDS):  # torn: a resume would mend each of them
        with path.open("ab") as file:
            file.write(b'{"torn')
    os.link(folder / name, outside)
    before = bytes_of(folder)
    read_run(folder)
    with pytest.raises(NotPlain, match=f"{name} is a hard link: its bytes have 2 names") as refused:
        JsonlObserver(folder, "ids")
    assert bytes_of(folder) == before
    cure = str(refused.value).partition("bytes of its own: ")[2]
    subprocess.run(cure, shell=True, check=True)
    JsonlObserver(folder, "ids").close()
    assert outside.read_bytes() == before[name]


def test_a_torn_line_of_a_link_is_not_mended(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b'{"a": 1}\n{"b')
    (tmp_path / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(NotPlain):
        mend(tmp_path / "metrics.jsonl")
    assert outside.read_bytes() == b'{"a": 1}\n{"b'


def test_a_line_without_end_is_refused_with_its_number(folder: Path) -> None:
    as_long_line(folder / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line \d+: longer than 64 MiB"):
        read_run(folder)
    with pytest.raises(ValueError, match=r"rows\.jsonl: longer than 64 MiB"):
        mend(folder / "rows.jsonl")


@pytest.mark.parametrize("kept", ["checkpoints", "capsules"])
def test_a_folder_of_a_run_that_is_a_link_is_neither_written_nor_read(
    tmp_path: Path, kept: str
) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    publish(elsewhere / kept / "update_000001", {"a": b"1"}, limit="x")
    run.mkdir()
    (run / kept).symlink_to(elsewhere / kept)
    with pytest.raises(NotSaved, match=f"{kept} is a link, not a plain folder"):
        publish(run / kept / "update_000002", {"a": b"1"}, limit="x")
    assert [path.name for path in (elsewhere / kept).iterdir()] == ["update_000001"]
    with pytest.raises(NotPlain, match=f"{kept} is a link, not a plain folder"):
        read(run / kept / "update_000001", ["a"])


def test_a_published_folder_that_is_a_link_is_replaced_and_not_written(tmp_path: Path) -> None:
    publish(tmp_path / "elsewhere/update_000001", {"a": b"1"}, limit="x")
    kept = tmp_path / "checkpoints"
    kept.mkdir()
    for name in ("update_000001", ".update_000001.writing", ".update_000009.removing"):
        (kept / name).symlink_to(tmp_path / "elsewhere/update_000001")
    with pytest.raises(NotPlain, match="update_000001 is a link"):
        read(kept / "update_000001", ["a"])
    publish(kept / "update_000001", {"a": b"2"}, limit="x")
    sweep(kept)
    assert read(kept / "update_000001", ["a"]) == {"a": b"2"}
    assert read(tmp_path / "elsewhere/update_000001", ["a"]) == {"a": b"1"}


def test_a_published_folder_holds_nothing_that_a_library_could_follow(tmp_path: Path) -> None:
    publish(tmp_path / "update_000001", {"a": b"1"}, limit="x")
    (tmp_path / "update_000001" / "note.txt").write_text("mine")  # a file without a sum is let be
    assert read(tmp_path / "update_000001", ["a"]) == {"a": b"1"}
    (tmp_path / "update_000001" / "added_tokens.json").symlink_to("/etc/hostname")
    with pytest.raises(NotPlain, match=r"added_tokens\.json is a link"):
        read(tmp_path / "update_000001", ["a"])
    (tmp_path / "update_000001" / "added_tokens.json").unlink()
    os.mkfifo(tmp_path / "update_000001" / "added_tokens.json")
    with pytest.raises(NotPlain, match=r"added_tokens\.json is a FIFO"):
        require_plain_entries(tmp_path / "update_000001")


def test_the_run_itself_may_be_reached_through_a_link(folder: Path) -> None:
    (folder.parent / "latest").symlink_to(folder)
    assert len(read_run(folder.parent / "latest").updates) == 12


def test_resume_reads_no_config_through_a_link(folder: Path) -> None:
    as_link(folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"--resume .*config\.yaml is a link"):
        parse(["--resume", str(folder)])


# Records that are damaged.


def fields() -> list[tuple[str, str, bool]]:
    """(file, field, whether it must be there)."""
    return [
        (
            name,
            field.name,
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for name, kind in KINDS.items()
        for field in dataclasses.fields(kind)
    ]


def changed(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    first, *rest = (folder / name).read_text().splitlines()
    record = json.loads(first)
    change(record)
    (folder / name).write_text("\n".join([json.dumps(record), *rest]) + "\n")


@pytest.mark.parametrize(("name", "field", "needed"), fields())
def test_a_field_that_is_missing_or_wrong_is_named_with_its_file_and_line(
    folder: Path, name: str, field: str, needed: bool
) -> None:
    changed(folder, name, lambda record: record.pop(field, None))
    if needed:
        with pytest.raises(ValueError, match=rf"{name}, line 1: {field} is missing; .*Remove"):
            read_records(folder / name)
    else:
        assert field in read_records(folder / name)[0]
    changed(folder, name, lambda record: record.update({field: [{"odd": 1}]}))
    with pytest.raises(ValueError, match=rf"{name}, line 1: .*{field}.*(is not|schema)"):
        read_records(folder / name)


@pytest.mark.parametrize("value", [1e300, 10**70, "fast", "NaN", True, [], None])
def test_a_number_that_no_arithmetic_bears_is_refused(folder: Path, value: object) -> None:
    changed(folder, "metrics.jsonl", lambda record: record.update(update_s=value))
    with pytest.raises(ValueError, match=r"line 1: update_s = .* is not a finite number"):
        read_run(folder)


def test_lists_of_ranks_must_agree(folder: Path) -> None:
    changed(folder, "metrics.jsonl", lambda record: record["rank_passes"].append(1))
    with pytest.raises(ValueError, match=r"rank_loss_nats, .* are not of one length"):
        read_run(folder)


def test_any_value_anywhere_is_read_or_refused_with_its_file(whole: Path, other: Path) -> None:
    folder = other.parent / "spoiled"
    for seed in range(150):
        drawn = random.Random(seed)
        copied(whole, folder)
        where = [spoil(folder, drawn) for _ in range(drawn.choice([1, 1, 2, 3]))]
        try:
            read_everything(folder, other)
        except ValueError as error:
            assert str(folder) in str(error), (where, error)


def test_an_alias_bomb_in_a_recorded_config_is_refused(folder: Path, other: Path) -> None:
    (folder / "config.yaml").write_text(BOMB)
    told = r"config\.yaml: not readable YAML \(its aliases stand for"
    with pytest.raises(ValueError, match=told):
        read_everything(folder, other)


def test_no_text_of_a_file_is_obeyed_by_a_terminal(
    folder: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every text of the run holds an escape."""
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202e"
    for name in ("events.jsonl", "metrics.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for line in lines:
            line |= {"message": evil, "command": evil, "reason": evil, "alarms": [evil]}
            if name == "metrics.jsonl" and line["update"] == 3:
                line["action"] = "skipped"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.yaml").read_text())
    config["model"] = {evil: evil}
    (folder / "config.yaml").write_text(json.dumps(config))
    folder = folder.rename(folder.with_name(f"run{evil[:9]}"))
    watched = Watched(folder)
    watched.refresh()
    screens = shown(Screen(watched)) + shown(
        render(compare([read_run(folder), read_run(other)])), 300
    )
    assert "\\x1b" in screens
    changed(folder, "metrics.jsonl", lambda record: record.update(update=evil))
    assert main(["report", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "\\x1b" in told and "update = " in told
    for sign in "\x1b\x07\r\u202e":
        assert sign not in screens + told
