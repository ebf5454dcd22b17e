"""Files of a run are opened plain, and emptied or read within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glassloop.disk.opening import NotPlain, open_plain, read_plain


def test_a_file_of_two_names_is_not_emptied_on_its_way_to_the_refusal(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("theirs")
    os.link(tmp_path / "log", tmp_path / "other")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with pytest.raises(NotPlain, match="log is a hard link"):
        open_plain(tmp_path / "log", flags)
    assert (tmp_path / "other").read_text() == "theirs"
    (tmp_path / "other").unlink()
    os.close(open_plain(tmp_path / "log", flags))
    assert (tmp_path / "log").read_text() == ""


def test_a_file_larger_than_asked_for_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_plain(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes, and a file of its kind has 4 at most"):
        read_plain(tmp_path / "a", 4)
