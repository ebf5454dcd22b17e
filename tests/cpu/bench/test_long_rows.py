"""benchmarks/long_rows.py: each case has a line, whatever becomes of its process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import long_rows
import pytest

SMALL = [
    "--model",
    "random:tiny",
    "--device",
    "cpu",
    "--cards",
    "24",
    "--seconds",
    "0.1",
    "--r",
    "4",
]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.thorough
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which has no build here"
)
def test_every_kind_of_case_runs_on_a_cpu_in_small(tmp_path: Path):
    out = tmp_path / "lines.jsonl"
    words = ["--lengths", "40,65", "--short-tokens", "9", "--compare", "50", "--out", str(out)]
    assert long_rows.main([*SMALL, "--only", "rows,short,compare,unsloth", *words]) == 0
    found = lines_of(out)
    rows = [line for line in found if line["kind"] == "case"]
    ours = [line for line in rows if line["engine"] == "fused"]
    assert [line["tokens"] for line in ours] == [40, 65]
    assert all(line["trained"] and line["tokens_per_s"] > 0 for line in ours), ours
    assert all(line["absent"] for line in rows if line["engine"] == "unsloth") and len(rows) == 4
    short = [line for line in found if line["kind"] == "short"]
    assert [line["workload"] for line in short] == ["full", "short"]
    assert all(line["same_tiers"] and line["ratio"] > 0 for line in short)
    assert len([line for line in found if line["kind"] == "compare"]) == 7
    assert all(line["apart"] < 1e-5 for line in found if line["kind"] == "compare")


def stand_in(tmp_path: Path, body: str) -> list[str]:
    """A process that does its cases by `body`, with `say` and `asked` at hand."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import json, sys, time, os\n"
        "asked = json.loads(open(sys.argv[1]).read())\n"
        "def say(**line):\n"
        "    with open(asked['out'], 'a') as file: file.write(json.dumps(line) + '\\n')\n"
        f"{body}\n"
    )
    return [sys.executable, str(script)]


DOES = """
say(kind="load")
for one in asked["cases"]:
    if one["n"] == 2: {fault}
    say(kind="case", n=one["n"], trained=True)
    say(kind="done", case=one)
"""


@pytest.mark.parametrize(
    ("fault", "why"),
    [("time.sleep(60)", "took over 0.8 s: the case"), ("sys.exit('no memory')", "no memory")],
)
def test_a_case_that_hangs_or_kills_its_process_leaves_a_line_and_the_others(
    tmp_path, fault, why, capsys
):
    out = tmp_path / "lines.jsonl"
    command = stand_in(tmp_path, DOES.format(fault=fault))
    cases = [{"kind": "case", "n": n} for n in (1, 2, 3)]
    long_rows.run_cases(command, cases, {}, engine="x", limit_s=0.8, load_s=30, out=out)
    rows = [line for line in lines_of(out) if line["kind"] == "case"]
    assert [(line["n"], line["trained"]) for line in rows] == [(1, True), (2, False), (3, True)]
    assert why in rows[1]["error"] and all(line["engine"] == "x" for line in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(lines_of(out))


def test_a_base_that_does_not_load_is_said_of_every_case_at_once(tmp_path):
    out = tmp_path / "lines.jsonl"
    command = stand_in(tmp_path, "sys.exit('no such model')")
    cases = [{"kind": "case", "n": n} for n in (1, 2)]
    long_rows.run_cases(command, cases, {}, engine="x", limit_s=5, load_s=30, out=out)
    assert ["no such model" in line["error"] for line in lines_of(out)] == [True, True]


def test_a_kind_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        long_rows.main(["--only", "rows,nothing", "--out", str(tmp_path / "x")])
    assert "choose of rows, unsloth" in capsys.readouterr().err


def test_the_command_that_starts_cases_needs_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import long_rows; "
    code += "assert 'torch' not in sys.modules"
    folder = str(Path(long_rows.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0
