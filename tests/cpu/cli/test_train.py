"""`glassloop train`: what it guesses, says and starts, and what it refuses before that."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from launching import write_rows

from glassloop.cli import train as command
from glassloop.cli.__main__ import main as glassloop
from glassloop.cli.train import Asked, accelerate_line, main, split
from glassloop.config import arguments
from glassloop.config.arguments import parse
from glassloop.loop import ranks as starting

Started = list[tuple[int, tuple[str, ...], bool]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """Ranks that would have been started: (number, words, on the CPU)."""
    found: Started = []

    def start(ranks: int, words: list[str], *, on_cpu: bool) -> int:
        found.append((ranks, tuple(words), on_cpu))
        return 0

    monkeypatch.setattr(starting, "start_ranks", start)
    monkeypatch.setattr(command, "devices", lambda gpus: (True, 0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", 37).name


def test_a_file_and_a_model_are_enough(
    rows: str, tiny_llama: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([rows, "--model", str(tiny_llama), "data.max_tokens=96"]) == 0
    ((ranks, words, on_cpu),) = started
    assert (ranks, on_cpu) == (2, True)
    config = parse(list(words))
    assert (config.data.source, config.model.id) == (rows, str(tiny_llama))
    assert (config.execution.precision, config.schedule.epochs) == ("fp32", 1)
    lines = capsys.readouterr().out.splitlines()
    block = {line[:10].strip(): line for line in lines}
    assert "prompt_completion" in block["format"]
    assert block["format"].endswith("data.format, data.columns.*")
    assert "chat (the tokenizer's own)" in block["template"]
    assert "2 rows x 2 ranks x 4 = 16 rows" in block["update"]
    assert "1 epoch = 3 updates" in block["length"]
    assert "about" in block["time"]
    assert "3 updates may be few to learn from: --epochs 7" in block["note"]
    assert max(len(line) for line in lines[:-1]) <= 80
    assert lines[-1] == f"start     {accelerate_line(2, words, on_cpu=True)}"


def test_garbage_is_searched_for_only_after_it(
    rows: str, tiny_llama: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching: list[bool] = []

    def start(*_, **__) -> int:
        searching.append(gc.isenabled())
        return 0

    monkeypatch.setattr(starting, "start_ranks", start)
    assert main([rows, "--model", str(tiny_llama), "data.max_tokens=96"]) == 0
    assert searching == [False]
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no such"):
        main(["no such file.csv", "--model", str(tiny_llama)])
    assert gc.isenabled()


def test_the_printed_line_starts_the_same_run(
    rows: str, tiny_llama: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    main([rows, "--model", str(tiny_llama), "--epochs", "2", "data.system=be brief", "--dry-run"])
    assert started == []
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert line[:3] == ["start", "accelerate", "launch"]
    script = line.index(str(starting.script()))
    config = parse(line[script + 1 :])
    assert (config.schedule.epochs, config.data.system) == (2, "be brief")


@pytest.mark.parametrize(
    "words", [["--preset", "smollm2_demo"], ["--preset=smollm2_demo"], ["smollm2_demo"]]
)
def test_a_preset_stands_in_for_file_and_model(words: list[str], tiny_llama: Path) -> None:
    asked = split([*words, "--model", str(tiny_llama)])
    assert command.run_words(asked) == ["smollm2_demo", f"model.id={tiny_llama}"]


def test_words_are_told_apart() -> None:
    words = (
        "a=b.csv --gpus 2 --optimizer.lr 1e-4 data.format=auto --resume.reshape seed=3 --dry-run"
    )
    assert split(words.split()) == Asked(
        sources=["a=b.csv"],
        options={"--gpus": "2"},
        words=["--optimizer.lr", "1e-4", "data.format=auto", "--resume.reshape", "seed=3"],
        dry_run=True,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "m"], "nothing says what to train on: name a file"),
        (["a.csv"], "nothing says which model to train: add --model ID"),
        (
            ["a.csv", "b.csv", "--model", "m"],
            "Quote a pattern so that the shell leaves it whole: '*.csv'",
        ),
        (["a.csv", "--model"], "--model needs a value"),
        (["none.csv", "--model", "m"], "data.source = none.csv"),
        (["a.csv", "--model", "m", "--epochs", "2", "schedule.updates=9"], "keep one"),
        (["a.csv", "--model", "m", "--learning_rate", "1"], "it is called optimizer.lr here"),
        (["a.csv", "--resume", "runs/x"], "leave them out"),
    ],
)
def test_a_refusal_names_the_cure_and_starts_nothing(
    words: list[str], said: str, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert glassloop(["train", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert started == []


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.devices(None) == (False, 2)
    assert command.devices("0") == (True, 2)
    with pytest.raises(ValueError, match="--gpus 3, but 2 are visible"):
        command.devices("3")
    config = parse(["batch.ranks=1"])
    assert command.ranks_for(config, None, 2, on_cpu=False) == 1
    assert command.ranks_for(parse([]), None, 2, on_cpu=False) == 2
    with pytest.raises(ValueError, match="differ: keep one"):
        command.ranks_for(config, "2", 2, on_cpu=False)


def test_alone_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    assert "glassloop train qa.csv --model Qwen/Qwen2.5-1.5B-Instruct" in text
    assert "r1_8b_scam" in text
    assert max(map(len, text.splitlines())) <= 80


def test_resume_takes_the_ranks_of_the_run(
    tmp_path: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {id: x}\n")
    (run / "plan.json").write_text(json.dumps({"ranks": 1}))
    assert main(["--resume", str(run), "schedule.updates=9"]) == 0
    assert started == [(1, ("--resume", str(run), "schedule.updates=9"), True)]
    assert "train_loop.py --resume" in capsys.readouterr().out


def test_a_launch_file_is_what_the_repository_ships() -> None:
    import yaml

    ships = Path(__file__).resolve().parents[3] / "accelerate_configs"
    for name, ranks, on_cpu in (
        ("cpu_2proc", 2, True),
        ("single_gpu", 1, False),
        ("ddp_2gpu", 2, False),
    ):
        ours = yaml.safe_load(starting.launch_file(ranks, on_cpu=on_cpu))
        assert ours == yaml.safe_load((ships / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("raised", "code"), [("interrupted", 130), ("failed", 2), ("killed", 1), (None, 0)]
)
def test_the_exit_code_is_the_runs(
    raised: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import signal

    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def launched(asked) -> None:
        assert asked.training_script_args == ["a.b=1"]
        assert Path(asked.config_file).is_file()
        assert (os.environ[arguments.STARTED_BY], os.environ["OMP_NUM_THREADS"]) == ("1", "3")
        if raised == "interrupted":
            raise SignalException("", signal.SIGINT)
        if raised:
            exitcode = 2 if raised == "failed" else -signal.SIGKILL
            raise ChildFailedError("", {1: ProcessFailure(1, 77, exitcode, "")})

    monkeypatch.setattr(launch, "launch_command", launched)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = dict(os.environ)
    assert starting.start_ranks(2, ["a.b=1"], on_cpu=True) == code
    assert dict(os.environ) == before
    assert ("rank 1 was killed by SIGKILL" in capsys.readouterr().out) == (raised == "killed")


def test_a_run_that_train_started_is_resumed_by_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from glassloop.loop.commands import launch_command

    monkeypatch.delenv(arguments.STARTED_BY, raising=False)
    assert "cpu_2proc.yaml" in launch_command(2, on_cuda=False)
    monkeypatch.setenv(arguments.STARTED_BY, "1")
    assert launch_command(2, on_cuda=False) == "glassloop train"


@pytest.mark.parametrize(("ranks", "on_cpu"), [(1, True), (2, True), (1, False), (4, False)])
def test_accelerate_understands_the_line_outside_of_a_checkout(
    ranks: int, on_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "none.yaml"))
    line = shlex.split(accelerate_line(ranks, ["data.source=a b.csv"], on_cpu=on_cpu))
    asked = launch.launch_command_parser().parse_args(line[2:])
    asked, _, _ = launch._validate_launch_command(asked)
    assert asked.training_script == str(starting.script())
    assert asked.training_script_args == ["data.source=a b.csv"]
    assert (asked.num_processes, bool(asked.multi_gpu)) == (ranks, ranks > 1)
    assert (asked.gpu_ids or "all") == ("-1,-1" if on_cpu else "all")


def test_ranks_that_train_has_started_do_not_say_the_hardware_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["smollm2_demo", "--hardware", "cpu", "execution.checkpointing=true"]
    monkeypatch.setattr(arguments, "_say_once", lambda text: print(text, file=sys.stderr))
    monkeypatch.delenv(arguments.STARTED_BY, raising=False)
    parse(words)
    assert "hardware  cpu: " in capsys.readouterr().err
    monkeypatch.setenv(arguments.STARTED_BY, "1")
    parse(words)
    assert capsys.readouterr().err == ""


def test_the_preview_says_why_rows_are_left_out_and_counts_tokens_of_the_others(
    tiny_llama: Path, started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 400
    (tmp_path / "qa.csv").write_text(f"question,answer\n{long},yes\n{long}!,yes\na,\nb,x\n")
    assert main(["qa.csv", "--model", str(tiny_llama), "data.max_tokens=96", "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 of qa.csv; left out: 1 empty" in text
    assert "2 longer than" in text and "96 tokens" in text
    found = re.search(r"tokens (\S+) a row \(median\), (\S+) at most \((\S+) in", text)
    assert found, text
    median, longest, read = (int(number.replace(",", "")) for number in found.groups())
    assert median == longest <= 96 < 400 < read
