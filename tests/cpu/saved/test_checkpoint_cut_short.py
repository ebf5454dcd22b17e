"""A save that dies or meets a full disk publishes nothing half."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Bench, load, names, save, state_at

from glassloop.disk import publish as folders
from glassloop.saved import checkpoint
from glassloop.saved.checkpoint import (
    CheckpointNotSaved,
    last_checkpoint,
)
from glassloop.saved.run_state import RunState

# Dying, and a disk that refuses

STEPS = ("fsync", "rename", "mkdir", "rmtree", "open", "tokenizer")


def watch(on_step: Callable[[str, Any], None], patch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Call on_step(kind, argument) before every step of a save that touches the disk."""

    def before(kind: str, place: Any, name: str, raising: bool = True) -> None:
        genuine = getattr(place, name) if raising else open

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            on_step(kind, args)
            return genuine(*args, **kwargs)

        patch.setattr(place, name, wrapped, raising=raising)

    for name in ("fsync", "rename", "mkdir"):
        before(name, os, name)
    before("rmtree", shutil, "rmtree")
    before("open", folders, "open", raising=False)
    before("tokenizer", tokenizer, "save_pretrained")


def steps_of_a_save(
    tmp_path: Path, original: Path, trained: Bench, tokenizer: Any, update: int
) -> int:
    count = [0]

    def on_step(kind: str, argument: Any) -> None:
        count[0] += 1

    run = shutil.copytree(original, tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        watch(on_step, patch, tokenizer)
        save(run, trained, tokenizer, state_at(update), keep=1)
    return count[0]


def whole(run: Path, name: str) -> bool:
    try:
        folders.read(run / "checkpoints" / name, checkpoint.REQUIRED)
    except ValueError:
        return False
    return True


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("update", "error"),
    [(60, FULL), (40, FULL), (60, KeyboardInterrupt())],
    ids=["full", "full, again", "ctrl-c"],
)
def test_a_failure_at_any_step_publishes_nothing_half_and_removes_nothing_early(
    update: int,
    error: BaseException,
    tmp_path: Path,
    original: Path,
    trained: Bench,
    scratch: Bench,
    tokenizer: Any,
) -> None:
    outcomes = []
    for fatal in range(steps_of_a_save(tmp_path, original, trained, tokenizer, update)):
        run = shutil.copytree(original, tmp_path / f"at_{fatal}")
        left = [fatal]

        def on_step(kind: str, argument: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise error

        with pytest.MonkeyPatch.context() as patch:
            watch(on_step, patch, tokenizer)
            try:
                notes = save(run, trained, tokenizer, state_at(update, attempt=2), keep=1).notes
                outcomes.append("untidy" if notes else "saved")
                assert error.__class__ is OSError
            except CheckpointNotSaved as refusal:
                outcomes.append("refused")
                assert str(run / "checkpoints") in str(refusal)
                assert "free space there" in str(refusal)
            except KeyboardInterrupt:
                outcomes.append("interrupted")
        found, _ = last_checkpoint(run)
        assert found is not None
        published = load(found, scratch).attempt == 2
        assert not published or found.name == f"update_{update:06d}"
        if not published:
            assert whole(run, "update_000020")
            assert whole(run, "update_000040") or whole(run, "update_000040.replaced")
        assert all(whole(run, name) for name in names(run) if name.startswith("update_"))
        if outcomes[-1] == "refused" and not published:
            assert not [name for name in names(run) if name.endswith(".writing")]
        again = save(run, trained, tokenizer, state_at(80, attempt=3), keep=1)
        assert not again.notes
        assert names(run) == ["update_000080"]
    assert outcomes.count("refused") + outcomes.count("interrupted") > 20
    assert tokenizer.chat_template == "the tokenizer's own"


def killed_save(
    run: Path, fatal: int, half: bool, synced: Path, one: Bench, tokenizer: Any, update: int
) -> None:
    """Save in a forked process that kills itself before step `fatal`, or in its write; note which
    inodes were synced."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    try:
        count = [0]
        log = os.open(synced, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def on_step(kind: str, argument: Any) -> None:
            count[0] += 1
            if count[0] > fatal:
                if half and kind == "open":
                    with open(argument[0], "wb") as file:
                        file.write(b"{")
                die()
            if kind == "fsync":
                os.write(log, f"{os.fstat(argument[0]).st_ino}\n".encode())

        watch(on_step, pytest.MonkeyPatch(), tokenizer)
        save(run, one, tokenizer, state_at(update, attempt=2), keep=1)
        die()
    finally:
        os._exit(3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("update", "half"),
    [(60, False), (40, False), (60, True)],
    ids=["new", "again", "new, half a file"],
)
def test_a_kill_at_any_step_loses_at_most_the_checkpoint_under_way_also_without_power(
    half: bool,
    update: int,
    tmp_path: Path,
    original: Path,
    trained: Bench,
    scratch: Bench,
    tokenizer: Any,
) -> None:
    kills = steps_of_a_save(tmp_path, original, trained, tokenizer, update)
    assert kills > 25
    published = 0
    for fatal in range(kills + 1):
        run, synced = (
            shutil.copytree(original, tmp_path / f"at_{fatal}"),
            tmp_path / f"synced_{fatal}",
        )
        old = {str(path.stat().st_ino) for path in run.rglob("*")}
        killed_save(run, fatal, half, synced, trained, tokenizer, update)
        safe = old | set(synced.read_text().split())
        for path in run.rglob("*"):  # the power fails too: what was never synced is gone
            if path.is_file() and str(path.stat().st_ino) not in safe:
                path.write_bytes(b"")
        assert all(whole(run, name) for name in names(run) if name.startswith("update_"))
        found, _ = last_checkpoint(run)
        assert found is not None
        if load(found, scratch).attempt == 2:
            published += 1
        else:
            assert whole(run, "update_000020"), (
                "an older checkpoint went before the new one was there"
            )
        assert not (run / "checkpoints/update_000040").exists() or whole(run, "update_000040")
        again = save(run, trained, tokenizer, state_at(update, attempt=3), keep=1)
        assert (names(run), again.notes) == ([f"update_{update:06d}"], ())
    assert 5 < published < kills


def trace_of(run: Path, one: Bench, tokenizer: Any, state: RunState) -> list[tuple[str, str, str]]:
    """(step, name, second name) of every sync, rename and removal."""
    seen: list[tuple[str, str, str]] = []

    def on_step(kind: str, argument: Any) -> None:
        if kind == "fsync":
            seen.append(
                (
                    kind,
                    os.readlink(f"/proc/self/fd/{argument[0]}")
                    .removeprefix(f"{run}/checkpoints")
                    .lstrip("/"),
                    "",
                )
            )
        elif kind in ("rename", "rmtree"):
            seen.append(
                (kind, *[Path(part).name for part in argument[:2]], *[""] * (2 - len(argument[:2])))
            )  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        watch(on_step, patch, tokenizer)
        save(run, one, tokenizer, state, keep=1)
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_synced_then_their_folder_then_the_rename_then_the_parent_then_older_ones_go(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    run = run.resolve()
    seen = trace_of(run, trained, tokenizer, state_at(60, heldout_loss_nats=1.0))
    work = ".update_000060.writing"
    rename = seen.index(("rename", work, "update_000060"))
    files = {path.name for path in (run / "checkpoints/update_000060").iterdir()}
    before = seen[:rename]
    assert {
        name.removeprefix(f"{work}/") for kind, name, _ in before if kind == "fsync"
    } == files | {work}
    assert before[-1] == ("fsync", work, "")
    assert seen[rename + 1] == ("fsync", "", "")
    old = ("update_000020", "update_000040")
    removals = [
        place for place, (kind, name, _) in enumerate(seen) if kind == "rmtree" or name in old
    ]
    assert len(removals) == 4
    assert min(removals) > rename + 1
    hidden = f".best.json.{os.getpid()}.writing"
    best = seen.index(("rename", hidden, "best.json"))
    assert ("fsync", hidden, "") in seen[rename:best]


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free space there, lower checkpoint.keep"),
        (errno.EDQUOT, "free space there"),
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.EIO, "see whether the disk is healthy"),
    ],
)
def test_a_disk_that_refuses_is_named_with_the_cure(
    number: int,
    cure: str,
    run: Path,
    trained: Bench,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(CheckpointNotSaved) as error:
            save(run, trained, tokenizer, state_at(60), keep=1)
    assert cure in str(error.value)
    assert str(run / "checkpoints/update_000060") in str(error.value)
    assert os.strerror(number) in str(error.value)
    assert names(run) == ["update_000020", "update_000040"]


def test_a_file_where_the_folder_should_be_is_named(
    tmp_path: Path, trained: Bench, tokenizer: Any
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointNotSaved, match="checkpoints/update_000060 was not saved"):
        save(tmp_path, trained, tokenizer, state_at(60))


@pytest.mark.parametrize("size", [50, 700, 20_000], ids=["template", "tokenizer", "weights"])
def test_a_file_that_cannot_grow_is_an_error_that_names_the_folder(
    size: int, run: Path, trained: Bench, tokenizer: Any, small_files_only: Callable[[int], None]
) -> None:
    small_files_only(size)
    with pytest.raises(
        CheckpointNotSaved, match=r"update_000060 was not saved: .*File too large.*free space there"
    ):
        save(run, trained, tokenizer, state_at(60), keep=1)
    small_files_only(resource.RLIM_INFINITY)
    assert names(run) == ["update_000020", "update_000040"]
    assert save(run, trained, tokenizer, state_at(60)).notes == ()


def test_a_failure_that_is_not_the_disks_is_not_called_so(
    run: Path, trained: Bench, tokenizer: Any, monkeypatch: Any
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such template")

    monkeypatch.setattr(tokenizer, "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="no such template"):
        save(run, trained, tokenizer, state_at(60))
    assert names(run) == ["update_000020", "update_000040"]
