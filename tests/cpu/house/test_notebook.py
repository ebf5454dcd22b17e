"""examples/two_t4.ipynb runs: here on the CPU, on one rank, with a tiny model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from glassloop.cli.__main__ import main as glassloop
from glassloop.loop import ranks

NOTEBOOK = Path(__file__).resolve().parents[3] / "examples" / "two_t4.ipynb"


def code_cells() -> list[tuple[list[str], str]]:
    """(tags, source) of each code cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [
        (cell["metadata"].get("tags", []), "".join(cell["source"]))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def test_the_cells_plan_train_ask_and_report(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import train_loop

    def here(_ranks: int, words: list[str], *, on_cpu: bool) -> int:
        assert on_cpu
        return train_loop.main([*words])

    monkeypatch.setattr(ranks, "start_ranks", here)
    monkeypatch.chdir(tmp_path)
    values = {
        "MODEL": str(tiny_llama),
        "FILE": "qa.csv",
        "HARDWARE": "cpu",
        "SETTINGS": "run.name=first lora.r=4 data.max_tokens=128 evaluation.samples=0 "
        "schedule.updates=2",
    }
    ran = []
    for tags, source in code_cells():
        if "install" in tags:
            continue
        if "settings" in tags:
            assert all(f"{name} = " in source for name in values)
            continue
        run_cell(source, values, ran.append)
    assert ran == [0] * 4
    assert (tmp_path / "runs/first/report.html").is_file()
    printed = capsys.readouterr()
    assert 'ask it: glassloop generate runs/first "YOUR QUESTION"' in printed.out + printed.err


def run_cell(source: str, values: dict[str, str], done: Callable[[int], None]) -> None:
    """Run Python lines as they are, and `!glassloop` lines in this process."""
    shell = [line for line in source.splitlines() if line.startswith("!")]
    if not shell:
        exec(compile(source, "cell", "exec"), dict(values))
        return
    for line in shell:
        command, *words = shlex.split(line[1:].format(**values))
        assert command == "glassloop"
        done(glassloop(words))


def test_the_notebook_says_that_it_is_untried_and_asks_for_fp16() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "Untried on T4 so far" in text
    assert "execution.engine=peft" in text

    from glassloop.config.hardware import hardware_values

    assert hardware_values("t4")["execution"]["precision"] == "fp16"
