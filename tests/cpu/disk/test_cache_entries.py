"""`glassloop cache`: what it lists, what it removes, and what stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from schemas import conform

from glassloop.cli.__main__ import main
from glassloop.cli.cache import age, size
from glassloop.disk import entries as cached
from glassloop.disk.cache import cache_root
from glassloop.disk.entries import Entry, entries, in_use, remove, share

DAY = 86400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache with something of each kind, unused for 40 days, and a file beside it."""
    (tmp_path / "mine.txt").write_text("mine")
    found = cache_root(str(tmp_path / "cache"))
    for name in (
        *("layers/base-nf4-0-f1", "quantized/base-nf4-0", "random-tiny-v1", "rows/key"),
        *("kernels/one", "layers/.base-nf4-0-f1.abc", "strange"),
    ):
        folder = found / name
        folder.mkdir(parents=True)
        (folder / "data.bin").write_bytes(b"x" * 10_000)
    (found / "file_hashes.json").write_text("{}")
    unused(found, 40 * DAY)
    return found


def unused(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then), follow_symlinks=False)


def names(found: list[Entry]) -> dict[str, str]:
    return {f"{one.parent}/{one.name}".lstrip("/"): one.kind for one in found}


def asked(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> tuple[int, str, str]:
    code = main(["cache", "--cache-dir", str(root), *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def left(root: Path) -> list[str]:
    """Everything in a cache but its own files, two levels deep."""
    found = [*root.glob("*/*"), *(path for path in root.iterdir() if path.is_dir())]
    outer = ("layers", "quantized", "rows", "kernels")
    here = {str(path.relative_to(root)) for path in found if path.name != "data.bin"}
    return sorted(here - set(outer))


def test_everything_is_listed_by_kind_with_its_size_and_last_use(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names(entries(root)) == {
        "layers/base-nf4-0-f1": "bases",
        "quantized/base-nf4-0": "bases",
        "random-tiny-v1": "bases",
        "rows/key": "rows",
        "kernels/one": "kernels",
        "layers/.base-nf4-0-f1.abc": "unfinished",
        "strange": "other",
    }
    assert all(one.size_bytes >= 10_000 for one in entries(root))
    before = left(root)
    code, out, _ = asked(capsys, root)
    assert code == 0 and out.count("40 d") == 7 and "in all: bases" in out
    assert "strange  (glassloop did not make it)" in out and left(root) == before
    code, out, _ = asked(capsys, root, "--json")
    told = conform("cache", json.loads(out))
    assert code == 0 and not any(one["removed"] for one in told["entries"])
    assert len(told["entries"]) == 7


def test_a_kind_is_removed_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(root)
    code, out, _ = asked(capsys, root, "--remove", "rows", "--dry-run")
    assert code == 0 and "rows/key: would be removed" in out and left(root) == before
    code, out, _ = asked(capsys, root, "--remove", "rows,kernels", "--json")
    told = conform("cache", json.loads(out))
    assert code == 0 and sorted(one["name"] for one in told["entries"] if one["removed"]) == [
        "key",
        "one",
    ]
    assert left(root) == [name for name in before if name not in ("rows/key", "kernels/one")]
    code, out, _ = asked(capsys, root, "--remove", "all")
    assert code == 0 and left(root) == ["strange"]
    assert (root / "file_hashes.json").is_file() and (root.parent / "mine.txt").is_file()


def test_only_what_is_old_goes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unused(root / "rows" / "key", 20 * DAY)
    assert asked(capsys, root, "--remove", "rows", "--older", "30d")[0] == 0
    assert "rows/key" in left(root)
    then = time.time() - 20 * DAY
    os.utime(
        root / "kernels" / "one" / "data.bin", (then, time.time() - 40 * DAY)
    )  # read, not made
    assert asked(capsys, root, "--remove", "kernels", "--older", "30d")[0] == 0
    assert "kernels/one" in left(root)
    assert asked(capsys, root, "--remove", "rows", "--older", "2w")[0] == 0
    assert "rows/key" not in left(root)


def test_what_was_just_used_or_is_half_made_stays(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unused(root / "rows" / "key", 60)
    unused(root / "layers" / ".base-nf4-0-f1.abc", DAY / 2)
    code, out, _ = asked(capsys, root, "--remove", "rows,unfinished")
    assert code == 1 and "rows/key: stays, just used" in out
    assert "it may be in the making" in out and len(left(root)) == 7


def test_what_a_process_has_open_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = root / "layers" / "base-nf4-0-f1" / "data.bin"
    code = (
        "import mmap, sys, time\n"
        "from glassloop.disk.entries import share\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    share(file.fileno())\n"
        "    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print('open', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(data)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        assert time.time() - data.stat().st_atime < 60, "the use is noted"
        unused(root, 40 * DAY)
        code_, out, _ = asked(capsys, root, "--remove", "bases")
        process.kill()
    assert code_ == 1 and "layers/base-nf4-0-f1: stays, in use" in out and data.is_file()
    assert asked(capsys, root, "--remove", "bases")[0] == 0 and not data.exists()


def test_a_folder_that_is_read_stays_and_says_when(root: Path) -> None:
    folder = root / "quantized" / "base-nf4-0"
    with in_use(folder):
        unused(root, 40 * DAY)
        (entry,) = (one for one in entries(root) if one.parent == "quantized")
        assert entry.kept == "in use" and remove(root, entry) == "in use"
    unused(root, 40 * DAY)
    with in_use(folder):
        pass
    (entry,) = (one for one in entries(root) if one.parent == "quantized")
    assert entry.kept == "just used" and time.time() - entry.used < 60


def test_a_use_that_begins_between_look_and_removal_wins(root: Path) -> None:
    (entry,) = (one for one in entries(root) if one.kind == "rows")
    assert not entry.kept
    with in_use(root / "rows" / "key"):
        assert remove(root, entry) == "in use"
    assert (root / "rows" / "key" / "data.bin").is_file()


def test_a_streamed_base_is_in_use_as_long_as_its_pages_are(
    tiny_llama: Path, tmp_path: Path
) -> None:
    import torch

    from glassloop.base.streamed import load_streamed
    from glassloop.config import ModelConfig
    from glassloop.plan.support import groups_of

    model = ModelConfig(id=str(tiny_llama), quantization="nf4", cache_dir=str(tmp_path / "cache"))
    hf, report, pages = load_streamed(
        model, groups_of, precision="fp32", device=torch.device("cpu"), first=nullcontext
    )
    root = tmp_path / "cache"
    unused(root, 40 * DAY)
    (entry,) = (one for one in entries(root) if one.parent == "layers")
    assert str(root / "layers" / entry.name) == report.folder and entry.kept == "in use"
    assert hf is not None and pages.host_bytes


def test_nothing_outside_is_followed_or_removed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "kept.txt").write_text("kept")
    os.symlink(outside, root / "rows" / "linked")
    os.symlink(outside, root / "rows" / "key" / "inner")
    os.symlink(outside / "deep" / "kept.txt", root / "rows" / "key" / "file")
    os.mkfifo(root / "rows" / "pipe")
    os.mkfifo(root / "rows" / "key" / "pipe")
    odd = root / "rows" / "\x1b[31mred\nline\udcff"
    odd.mkdir()
    unused(root / "rows" / "key", 40 * DAY)
    unused(odd, 40 * DAY)
    unused(outside, 40 * DAY)
    code, out, _ = asked(capsys, root, "--remove", "rows")
    assert code == 1 and "rows/linked: stays, it is a link" in out
    assert "rows/pipe: stays, it is neither" in out and "\x1b" not in out
    assert (outside / "deep" / "kept.txt").read_text() == "kept"
    assert not (root / "rows" / "key").exists() and not odd.exists()
    os.symlink(outside, root / "elsewhere")
    (root / "kernels" / "one" / "data.bin").unlink()
    (root / "kernels" / "one").rmdir()
    (root / "kernels").rmdir()
    os.symlink(outside, root / "kernels")  # where a folder of entries should be
    code, out, _ = asked(capsys, root, "--remove", "all")
    assert (outside / "deep" / "kept.txt").is_file() and "deep" not in out


def test_an_entry_that_becomes_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    (entry,) = (one for one in entries(root) if one.kind == "rows")
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "rows" / "key").rename(root / "rows" / "was")
    os.symlink(outside, root / "rows" / "key")
    assert "cannot be opened" in remove(root, entry) and outside.is_dir()
    (root / "rows").rename(root / "rows-was")
    os.symlink(outside, root / "rows")
    (outside / "key").mkdir()
    with pytest.raises(OSError, match="rows"):
        remove(root, entry)
    assert (outside / "key").is_dir()


def test_a_disk_without_locks_keeps_everything(root: Path, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(cached.errno.ENOLCK, "no locks")

    monkeypatch.setattr(cached.fcntl, "flock", refuses)
    (entry,) = (one for one in entries(root) if one.kind == "rows")
    assert "no locks" in entry.kept and "no locks" in remove(root, entry)
    with in_use(root / "rows" / "key"):  # reading does not need them
        pass


def test_what_is_being_removed_is_not_read(root: Path) -> None:
    fcntl = cached.fcntl
    holder = os.open(root / "rows" / "key", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    other = os.open(root / "rows" / "key", os.O_RDONLY)
    with pytest.raises(ValueError, match="start again"):
        share(other)
    os.close(holder)
    share(other)
    os.close(other)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ["--remove", "other"],
            "--remove other: there are bases, rows, kernels, unfinished, or all",
        ),
        (["--remove", "rows,../x"], "--remove ../x: there are"),
        (["--remove", ""], "--remove '': there are"),
        (["--remove", "rows", "--older", "30"], "--older 30: say a number and m, h, d or w"),
        (["--remove", "rows", "--older", "-1d"], "--older -1d"),
        (["--older", "30d"], "go with --remove"),
        (["--dry-run"], "go with --remove"),
    ],
)
def test_what_cannot_be_done_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    before = left(root)
    if words[-1] == "-1d":
        words = [*words[:-2], "--older=-1d"]
    code, _, err = asked(capsys, root, *words)
    assert code == 2 and why in err and left(root) == before


def test_a_folder_that_is_no_cache_is_refused_and_none_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    (home / "rows" / "thesis").mkdir(parents=True)
    unused(home, 40 * DAY)
    for tag in (None, "Signature: 8a477f597d28d172789f06886806bc55\n# pip's\n"):
        if tag is not None:
            (home / "CACHEDIR.TAG").write_text(tag)
        code, _, err = asked(capsys, home, "--remove", "all")
        assert code == 2 and "is no cache of glassloop" in err
    assert (home / "rows" / "thesis").is_dir()
    code, out, _ = asked(capsys, tmp_path / "none", "--remove", "all")
    assert code == 0 and "it is empty" in out and not (tmp_path / "none").exists()


def test_sizes_and_ages_are_said_in_their_largest_unit() -> None:
    assert [size(count) for count in (0, 2048, 3 * 2**30, 5 * 2**41)] == [
        "0.0 KiB",
        "2.0 KiB",
        "3.0 GiB",
        "10.0 TiB",
    ]
    assert [age(seconds) for seconds in (5, 125, 7200, 9 * DAY)] == ["now", "2 m", "2 h", "9 d"]
