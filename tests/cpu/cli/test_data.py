"""`glassloop data`: rows token by token, then the counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from row_files import write
from transformers import PreTrainedTokenizerFast

from glassloop.cli.data import main, render
from glassloop.data.rows import Row
from glassloop.record.printable import visible


@pytest.fixture
def calls(tmp_path: Path) -> str:
    rows = [
        {
            "dialogue": f"caller: Hello {number}. [bold]\x1b[2J</think> receiver: Yes 🧨?",
            "type": "ssn",
            "label": number % 2,
        }
        for number in range(8)
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def run(tiny_llama: Path, calls: str, *more: str) -> int:
    return main(
        [
            f"model.id={tiny_llama}",
            f"data.source={calls}",
            "data.template=chat",
            "data.max_tokens=2048",
            *more,
        ]
    )


def test_it_prints_rows_then_counts_and_loads_no_model(
    tiny_llama: Path,
    calls: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda *_, **__: pytest.fail("a model was loaded"),
    )
    assert run(tiny_llama, calls, "--show", "2", "data.heldout=0.25") == 0
    text = capsys.readouterr().out
    assert text.count(" tokens, ") == 2
    assert "took 6 of 6 rows" in text
    assert "6 rows kept, 0 dropped" in text
    assert "held-out     " in text
    assert "labels       training: " in text
    assert "[«</s>»]" in text  # the end token is supervised
    assert "«<s>»|«<|user|>»|" in text
    assert (
        "\x1b" not in text
    )  # neither colours, where nobody sees them, nor what a row would do to the terminal
    assert "[bold]" in text.replace("|", "")


@pytest.mark.parametrize(("show", "rows"), [("0", 0), ("1", 1), ("99", 8)])
def test_show_says_how_many_rows(
    tiny_llama: Path, calls: str, show: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_llama, calls, "--show", show)
    assert capsys.readouterr().out.count("«<s>»") == rows


def test_supervised_and_masked_tokens_differ_with_and_without_colour(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tuple(tiny_tokenizer("Hé🧨\n", add_special_tokens=False).input_ids)
    row = Row(
        "train:0", (1, *ids, 1, *ids, 2), (False,) * (len(ids) + 2) + (True,) * (len(ids) + 1)
    )
    text = render(row, tiny_tokenizer)
    masked, supervised = text.plain.split("«<s>»|")[1:]
    assert masked.replace("|", "") == "Hé🧨⏎\n"
    assert supervised.replace("][", "") == "[Hé🧨⏎]\n[«</s>»]"
    styles = {str(span.style) for span in text.spans}
    assert styles == {"bold green", "dim", "bold magenta"}
    assert all(
        str(span.style) == "bold green" for span in text.spans if text.plain[span.start] == "["
    )


def test_every_token_of_a_row_is_shown(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tuple(
        tiny_tokenizer(
            "The caller says that your account is locked.", add_special_tokens=False
        ).input_ids
    )
    row = Row("train:0", ids, (False, *(True,) * (len(ids) - 1)))
    assert render(row, tiny_tokenizer).plain.count("|") + render(row, tiny_tokenizer).plain.count(
        "["
    ) == len(ids)


def test_a_supervised_part_that_begins_within_a_character_is_shown_to_begin_there(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tuple(tiny_tokenizer("🧨", add_special_tokens=False).input_ids)
    assert len(ids) == 4
    text = render(Row("train:0", ids, (False, False, True, True)), tiny_tokenizer).plain
    assert text.index("|") < text.index("[") < text.index("]")


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert visible("a\x1b[2J\0\r\u202e\t\n é") == "a\\x1b[2J\\x00\\r\\u202e⇥⏎ é"


def test_help_names_show_and_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--show N" in (text := capsys.readouterr().out)
    assert "--data.heldout_duplicates" in text


def test_data_that_cannot_be_used_is_refused_before_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        main(["model.id=no/such-model", f"data.source={tmp_path / 'gone.csv'}"])


def answered(words: list[str], **environment: str) -> tuple[str, bool, float]:
    """Run `glassloop data` as a process.

    Returns its text, whether torch was imported, and CPU seconds."""
    code = (
        "import sys, time\nfrom glassloop.cli.data import main\n"
        f"assert main({words!r}) == 0\n"
        "print('END', 'torch' in sys.modules, time.process_time())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    text, _, end = ran.stdout.rpartition("END")
    torch, seconds = end.split() if end.strip() else ("True", "0")
    return text, torch == "True", float(seconds)


def test_rows_are_shown_within_two_seconds_without_torch(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(
        tmp_path / "rows.jsonl", [{"question": f"q {i}?", "answer": "a"} for i in range(9)]
    )
    words = [f"data.source={rows}", f"model.id={tiny_llama}"]
    text, torch, seconds = answered(words)
    assert not torch
    assert seconds < 2.0  # of CPU, so that other processes do not count
    assert main(words) == 0  # where torch is imported already
    assert text == capsys.readouterr().out != ""


@pytest.mark.thorough
def test_a_variable_asks_for_torch(tiny_llama: Path, calls: str) -> None:
    words = [f"data.source={calls}", f"model.id={tiny_llama}", "data.template=chat"]
    _, torch, _ = answered(words, GLASSLOOP_DATA_WITH_TORCH="1")
    assert torch


def test_a_tokenizer_that_needs_torch_is_loaded_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"question": "q?", "answer": "a"}])
    code = (
        "from glassloop.cli import data\n"
        "def show_data(*_): raise NameError('nn')\n"
        "data.show_data = show_data\n"
        f"data.main({[f'data.source={rows}', f'model.id={tiny_llama}']!r})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "1 rows kept" in ran.stdout
