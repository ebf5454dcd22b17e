"""A file is published whole: the old one or the new one."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from glassloop.disk.publish import write_json, write_text


@pytest.mark.parametrize("broken", ["rename", "fsync"])
def test_a_published_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "env.json"
    write_json(path, {"a": "｜", "b": [1, None]})
    assert json.loads(path.read_text()) == {"a": "｜", "b": [1, None]}

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match=r"env\.json .*Input/output error"):
            write_text(path, "new")
    assert json.loads(path.read_text()) == {"a": "｜", "b": [1, None]}
    assert os.listdir(tmp_path) == ["env.json"]  # no temporary file is left
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(file: int) -> None:
        calls.append(
            "folder"
            if os.path.isdir(f"/proc/self/fd/{file}")
            else f"{os.fstat(file).st_size} bytes"
        )
        fsync(file)

    def spy_rename(source: Any, target: Any) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    write_text(tmp_path / "config.yaml", "12345")
    assert calls == ["5 bytes", "rename", "folder"]


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "plan.json", {"a": math.nan})
    assert os.listdir(tmp_path) == []
