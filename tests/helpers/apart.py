"""A home and a temporary folder for one session of tests.

What the session leaves behind is found.

Importing this module moves HOME and TMPDIR, for this process and all that it starts. Workers of
pytest-xdist share the folders of the process that started them. `left_behind` lists what the
tests left in the two folders and in the repository; `remove` deletes the folders.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "GLASSLOOP_TESTS_FOLDER"
# What libraries never remove.
KNOWN = (
    "home/.cache/dconf/*",
    "home/.cache/huggingface/datasets/*",  # copies of data files
    "home/.cache/huggingface/modules/*",  # code of models
    "home/.cache/huggingface/hub",  # Unsloth makes the two folders when it is imported
    "home/.cache/huggingface/xet",
    "home/.cache/matplotlib/*",
    "home/.cache/wandb/*",
    "home/.config/chromium/*",
    "home/.config/matplotlib*",
    "home/.config/wandb*",
    "home/.nv/*",  # what CUDA's driver compiled
    "tmp/tmp*wandb-*",  # artifacts and media of a tracked run
    "tmp/torchelastic_*",  # logs of torch's launcher
    "tmp/torchinductor_*",  # made when torch's compiler is imported
)
CACHES = (
    ".git",
    ".benchmarks",
    ".venv*",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
    ".coverage",
)


def _move() -> Path:
    temporary, home = Path(tempfile.gettempdir()), Path.home()
    for left in temporary.glob("glassloop-tests-*-*"):  # of sessions that were killed
        pid = left.name.split("-")[2]
        if pid.isdigit() and not _lives(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"glassloop-tests-{os.getpid()}-"))
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(temporary))  # tmp_path stays inspectable
    os.environ.setdefault("TRITON_CACHE_DIR", str(home / ".triton" / "cache"))
    os.environ[MARK] = str(folder)
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    return folder


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


OWNER = MARK not in os.environ
SESSION = _move() if OWNER else Path(os.environ[MARK])


def in_repository() -> set[str]:
    """Paths of the repository's files and folders, without git's own and caches."""
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch(name, one) for one in CACHES)]
        found.update(os.path.relpath(os.path.join(folder, name), ROOT) for name in folders + files)
    return {name for name in found if not any(fnmatch(name, one) for one in CACHES)}


def left_behind(before: set[str]) -> list[str]:
    """Return what lies in the session's folders, and new files here.

    `before`: what the repository had.
    """
    apart = set()
    for name in ("home", "tmp"):
        for folder, folders, files in os.walk(SESSION / name):
            place = os.path.relpath(folder, SESSION)
            apart.update(os.path.join(place, file) for file in files)
            if not folders and not files and place != name:
                apart.add(place)
    apart = {name for name in apart if not any(fnmatch(name, known) for known in KNOWN)}
    return sorted(apart) + sorted(in_repository() - before)


def remove() -> None:
    """Delete the session's folders."""
    shutil.rmtree(SESSION, ignore_errors=True)
