"""The power goes off at every moment of a run.

Whatever was not synced may be lost, and the run resumes from its last checkpoint.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lossy_disk import (
    Crash,
    LossyDisk,
    anything,
    bytes_without_names,
    names_without_bytes,
    nothing_unsynced,
)

from glassloop.config import as_dict
from glassloop.disk.publish import read
from glassloop.record.jsonl import mend, read_jsonl
from glassloop.record.observers import JsonlObserver
from glassloop.record.records import Event
from glassloop.saved.capsule import find_capsules, read_capsule
from glassloop.saved.checkpoint import (
    PUBLISHED,
    REQUIRED,
    last_checkpoint,
    load_checkpoint,
    read_state,
)
from glassloop.saved.resuming import read_plan
from train_loop import update_once

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
UPDATES = 3


@dataclass(frozen=True)
class Watched:
    run: Any
    disk: LossyDisk
    safe: list[
        tuple[int, int]
    ]  # (calls, update): from then on a checkpoint of the update must be found
    digests: dict[int, bytes]  # the adapter that was saved after an update
    folder: Path


@pytest.fixture(params=[True, False], ids=["with a best", "without"])
def watched(tmp_path: Path, run_of: Any, request: pytest.FixtureRequest) -> Watched:
    """A run of three updates on a watched disk.

    It saves a checkpoint after each (the last one twice) and two capsules.
    """
    root = (tmp_path / "disk").resolve()
    root.mkdir()
    disk = LossyDisk(root)
    safe, digests = [], {}
    with disk.watching():
        run = run_of(
            schedule={"updates": UPDATES, "warmup_updates": 1},
            checkpoint={"keep": 1},
            record={"capture_updates": (2, 3), "capsules": 1, "probe_every_updates": 1},
            run={"dir": str(root / "runs")},
        )
        for update in (1, 2, 3):
            run.tell(update_once(run, update))
            if request.param:
                run.heldout_nats = (
                    update,
                    3.0 - update / 2,
                )  # so that best.json is replaced each time
            run.save(update)
            safe.append((len(disk.trace), update))
            digests[update] = (
                run.folder / f"checkpoints/update_{update:06d}/adapter_model.safetensors"
            ).read_bytes()
        run.last_saved = None
        run.save(3)  # in place of the first
    return Watched(run, disk, safe, digests, run.folder.relative_to(root))


def check(left: Path, crash: Crash, watched: Watched) -> int:
    """Check a run's folder after a crash.

    Returns the update that it resumes from.
    """
    folder = left / watched.folder
    found, notes = last_checkpoint(folder)
    done = 0 if found is None else read_state(found).update
    due = max((update for calls, update in watched.safe if crash.at >= calls), default=0)
    assert done >= due, f"the checkpoint of update {due} is lost: {notes}"
    for path in (folder / "checkpoints").glob("*"):
        if PUBLISHED.fullmatch(path.name):
            read(path, REQUIRED)  # a published name is complete
        elif path.name == "best.json":
            json.loads(path.read_text())
    for capsule in find_capsules(folder / "capsules"):
        read_capsule(capsule)
    if found is None:
        return 0
    assert (found / "adapter_model.safetensors").read_bytes() == watched.digests[done]
    assert (folder / "config.yaml").read_text()
    assert read_plan(folder)["updates"] == UPDATES
    for name in ("metrics.jsonl", "rows.jsonl", "probes.jsonl"):
        mend(folder / name)
        updates = {line["update"] for line in read_jsonl(folder / name)}
        assert updates >= set(range(1, done + 1)), (
            f"{name} has lost updates of the checkpoint: {sorted(updates)}"
        )
    return done


@pytest.mark.thorough
def test_whatever_was_not_synced_is_lost_and_the_last_checkpoint_is_found(
    watched: Watched, tmp_path: Path
) -> None:
    drawn = random.Random(3)
    ways = [nothing_unsynced, names_without_bytes, bytes_without_names, *[anything(drawn)] * 2]
    ends = []
    for crash, way in itertools.product(watched.disk.crashes, ways):
        left = tmp_path / "left"
        crash.leave(left, way)
        try:
            ends.append(check(left, crash, watched))
        except (AssertionError, ValueError, OSError) as error:
            raise AssertionError(
                f"power lost after call {crash.at} ({crash.call}): {error}"
            ) from error
        shutil.rmtree(left)
    assert len(watched.disk.crashes) > 150
    assert set(ends) == set(range(UPDATES + 1))
    whole = watched.disk.crashes[-1]
    whole.leave(tmp_path / "left", nothing_unsynced)
    run = watched.run
    found, _ = last_checkpoint(tmp_path / "left" / watched.folder)
    assert found is not None
    before = run.replica.adapters.flat.detach().clone()
    run.replica.adapters.flat.data.zero_()
    shared: dict[str, Any] = dict(
        rank=0,
        world_size=1,
        base_hash=run.replica.plain_engine.report.base_hash,
        config=as_dict(run.config),
    )
    assert (
        load_checkpoint(
            found, adapters=run.replica.adapters, optimizer=run.replica.optimizer, **shared
        ).update
        == UPDATES
    )
    assert all(
        place.of(run.replica.adapters.flat).equal(place.of(before))
        for place in run.replica.adapters.slices.values()
    )


def test_a_disk_that_forgets_does_forget(tmp_path: Path) -> None:
    """Check that the harness itself loses unsynced bytes and names."""
    root = (tmp_path / "disk").resolve()
    root.mkdir()
    disk = LossyDisk(root)
    with disk.watching():
        (root / "a.tmp").write_bytes(b"12345678")
        (root / "a.tmp").rename(root / "a")
    left = tmp_path / "left"
    seen = set()
    for way in (
        nothing_unsynced,
        names_without_bytes,
        bytes_without_names,
        *[anything(random.Random(5))] * 40,
    ):
        disk.crashes[-1].leave(left, way)
        seen |= {(path.name, path.read_bytes()) for path in left.iterdir()} or {("", b"")}
        shutil.rmtree(left)
    assert seen == {
        (name, data)
        for name in ("a", "a.tmp")
        for data in (b"", b"1234", b"1234\0\0\0\0", b"12345678")
    } | {("", b"")}


def test_a_line_that_was_synced_is_there_also_where_its_file_is_new(tmp_path: Path) -> None:
    root = (tmp_path / "disk").resolve()
    root.mkdir()
    disk = LossyDisk(root)
    with disk.watching():
        observer = JsonlObserver(root / "runs/one")
        observer.on_event(Event(1, "started", "look"))
        observer.sync()
        observer.close()
    disk.crashes[-1].leave(tmp_path / "left", nothing_unsynced)
    assert [line["message"] for line in read_jsonl(tmp_path / "left/runs/one/events.jsonl")] == [
        "look"
    ]


def test_records_are_synced_before_a_checkpoint_is_published_and_older_ones_go_last(
    watched: Watched,
) -> None:
    trace = [(call, path.removeprefix(f"{watched.folder}/")) for call, path in watched.disk.trace]
    for update in range(1, UPDATES + 1):
        work = f"checkpoints/.update_{update:06d}.writing"
        rename = trace.index(("rename", work))
        records = [
            trace[:rename].count(("fsync", name))
            for name in ("metrics.jsonl", "rows.jsonl", "events.jsonl")
        ]
        assert min(records) >= update
        assert trace[rename - 1] == ("fsync", work)
        assert trace[rename + 1] == ("fsync", "checkpoints")
        gone = ("rename", f"checkpoints/update_{update - 1:06d}")
        if update > 1:
            assert trace.index(gone) > rename + 1
