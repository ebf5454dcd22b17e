"""A session of tests has a home and a temporary folder of its own, and leaves nothing in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import apart
import pytest
from launching import HERE, ROOT, environment, run


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ([], []),
        (["tmp/torchelastic_x/log"], []),
        (["home/settings", "tmp/a/b"], ["home/settings", "tmp/a/b"]),
    ],
    ids=["nothing", "what a library leaves", "two files"],
)
def test_a_session_that_leaves_something_fails_and_names_it(
    leaves: list[str], said: list[str], tmp_path: Path
) -> None:
    lines = ["import pathlib, tempfile", "def test_leaves():"]
    lines += ["    folder = pathlib.Path(tempfile.gettempdir()).parent", "    print(folder)"]
    for name in leaves:
        lines += [f"    (folder / '{name}').parent.mkdir(parents=True, exist_ok=True)"]
        lines += [f"    (folder / '{name}').write_text('')"]
    (tmp_path / "test_leaves.py").write_text("\n".join(lines))
    killed, living = (tmp_path / f"glassloop-tests-{pid}-x" for pid in (2**22 + 1, os.getpid()))
    killed.mkdir()
    living.mkdir()
    env = environment(
        TMPDIR=str(tmp_path), PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    )
    del env[apart.MARK]
    words = ["-q", "-s", "-p", "conftest", "-p", "no:cacheprovider", "test_leaves.py"]
    done = run([sys.executable, "-m", "pytest", *words], env=env, cwd=tmp_path)
    assert not killed.exists() and living.exists()
    assert done.returncode == (1 if said else 0), done.stdout + done.stderr
    assert ("left behind" in done.stderr) == bool(said)
    for name in said:
        assert f"\n  {name}" in done.stderr
    (folder,) = [line for line in done.stdout.splitlines() if "glassloop-tests-" in line]
    assert not Path(folder.lstrip(".")).exists()


def test_what_is_new_in_the_repository_is_named() -> None:
    before = apart.in_repository()
    assert {"Makefile", "tests/conftest.py"} <= before
    assert not any(name.startswith((".git/", ".venv")) for name in before)
    assert "Makefile" in apart.left_behind(before - {"Makefile"})
