"""A stranger's run is data: no code runs, no folder is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trained_runs import copy_of, write_config

from glassloop.cli.__main__ import main
from train_loop import main as train

CODE = """import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({mark!r}).touch()
class Strange(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def strange(run: Path, tmp_path: Path) -> Path:
    """A copy whose tokenizer brings code, which its config asks to run."""
    folder = copy_of(run, tmp_path / "strange")
    for checkpoint in folder.glob("checkpoints/update_*"):
        (checkpoint / "strange.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
        path = checkpoint / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings["auto_map"] = {"AutoTokenizer": ["strange.Strange", "strange.Strange"]}
        settings["tokenizer_class"] = "Strange"
        path.write_text(json.dumps(settings))
    write_config(folder, "model", trust_remote_code=True)
    return folder


def commands(folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    study = tmp_path / "study.yaml"
    study.write_text(
        "question: q\ncannot_say: c\nbase: smollm2_demo model.trust_remote_code=true\n"
        "axes:\n  lora.r: [1, 2]\n"
    )
    other = str(tmp_path / "out")
    file = str(folder / "config.yaml")
    (capsule,) = folder.glob("capsules/update_000002*")
    return {
        "generate": ["generate", str(folder), "hi"],
        "evaluate": ["evaluate", str(folder)],
        "merge": ["merge", str(folder), other],
        "push": ["push", str(folder), "me/it", "--dry-run", other],
        "replay": ["replay", str(folder), "--update", "1"],
        "replay of a capsule": ["replay", str(capsule)],
        "resume": ["train", "--resume", str(folder), "schedule.updates=3"],
        "train": ["train", "--config", file, "run.name=new"],
        "data": ["data", "--config", file],
        "plan": ["plan", "--config", file],
        "doctor": ["doctor", "--config", file],
        "study": ["study", str(study), "--out", other, "--dry-run"],
    }


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = train(words[1:]) if words[0] == "train" else main(words)
    out = capsys.readouterr()
    return code, out.out + out.err


def test_no_command_runs_code_because_a_file_says_so(strange, tmp_path, capsys):
    for name, words in commands(strange, tmp_path).items():
        code, text = said(words, capsys)
        add = "model.trust_remote_code=true"
        if name in ("generate", "evaluate", "merge", "push"):
            add = "--trust-remote-code"
        assert code == 2 and f"add {add}" in text, (name, text)
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists(), name


def test_the_command_line_may_trust_it(strange, tmp_path, capsys):
    words = ["generate", str(strange), "hi", "--max-new-tokens", "2"]
    assert said([*words, "--no-trust-remote-code"], capsys)[0] == 2  # its tokenizer needs the code
    assert not (tmp_path / "ran").exists()
    words += ["--trust-remote-code", f"--cache-dir={tmp_path / 'cache'}"]
    code, text = said(words, capsys)
    assert code == 0 and (tmp_path / "ran").exists(), text


def test_a_recorded_config_makes_no_folder_elsewhere(run, tmp_path, capsys):
    folder = copy_of(run, tmp_path / "strange")
    elsewhere = tmp_path / "elsewhere"
    write_config(folder, "model", cache_dir=str(elsewhere))
    for name, words in commands(folder, tmp_path).items():
        if name in ("generate", "evaluate", "merge", "push", "resume") or "replay" in name:
            code, text = said(words, capsys)
            assert code == 2 and f"model.cache_dir = {elsewhere} stands in" in text, (name, text)
            assert not elsewhere.exists(), name
    words = ["generate", str(folder), "hi", "--max-new-tokens", "2"]
    assert said([*words, f"--cache-dir={elsewhere}"], capsys)[0] == 0
    assert said(words, capsys)[0] == 0  # it is a cache now
