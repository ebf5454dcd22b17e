"""A resumed run knows what its folder held before the lock was taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import forge
from resumed_runs import resumed

from glassloop.disk.lock import LOCK
from glassloop.loop import starting


def saves(folder: Path) -> None:
    later = folder / "checkpoints/update_000003"
    shutil.copytree(folder / "checkpoints/update_000002", later)
    forge(later, "state.json", lambda state: state | {"update": 3, "serial": 9})


def saves_again(folder: Path) -> None:
    """Under the same name, as after a resume from an older one."""
    forge(folder / "checkpoints/update_000002", "state.json", lambda state: state | {"serial": 9})


def rewrites_config(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("checkpointing: false", "checkpointing: true"))


def rewrites_plan(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updates": 7}))


def removes_plan(folder: Path) -> None:
    (folder / "plan.json").unlink()


DONE: dict[str, tuple[Callable[[Path], None], str]] = {
    "saves": (saves, "saved another checkpoint"),
    "saves again": (saves_again, "saved another checkpoint"),
    "rewrites config.yaml": (rewrites_config, "rewrote config.yaml"),
    "rewrites plan.json": (rewrites_plan, "rewrote plan.json"),
    "removes plan.json": (removes_plan, "rewrote plan.json"),
}


@pytest.mark.parametrize(("does", "told"), DONE.values(), ids=DONE)
def test_what_the_earlier_process_does_before_the_lock_is_noticed(
    begun: Path, does: Callable[[Path], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = starting.claim

    def late(folder: Path, *args, **options):  # the earlier process ends just before
        does(folder)
        return genuine(folder, *args, **options)

    monkeypatch.setattr(starting, "claim", late)
    with pytest.raises(ValueError, match=rf"earlier process {told} while this one started"):
        resumed(begun)
    assert not (begun / LOCK).exists()
    monkeypatch.undo()
    resumed(begun)
