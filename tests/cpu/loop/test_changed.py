"""A resumed run's folder tells the truth about every setting that may change, and what moved."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import changed_events, files, resumed, value_of

from glassloop.config.names import field_names
from glassloop.loop import build, starting
from glassloop.loop.changed import in_words, keep_aside, machine_changes, plan_changes
from glassloop.record.reading import file_of
from glassloop.record.records import Event, to_json
from glassloop.saved.changes import computes
from train_loop import update_once

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
# Another value than the run began with, for every field that may change on a CPU.
OTHERWISE = {
    "model.cache_dir": "CACHE",
    "model.trust_remote_code": "true",
    "batch.ranks": "1",
    "execution.layout": "packed",
    "execution.pass_tokens": "200",
    "execution.reduction": "ddp",
    "execution.backend": "gloo",
    "execution.collective_timeout_s": "900",
    "execution.precision": "bf16",
    "execution.checkpointing": "true",
    "execution.preflight": "false",
    "execution.on_out_of_memory": "stop",
    "execution.deterministic": "true",
    "stability.on_nonfinite": "skip",
    "stability.max_skipped": "7",
    "stability.on_spike": "clip",
    "stability.on_vanishing": "stop",
    "stability.on_no_learning": "stop",
    "stability.on_diverged": "stop",
    "stability.window_updates": "10",
    "stability.false_alarm_rate": "1e-4",
    "stability.no_learning_updates": "50",
    "stability.initial_loss_scale": "1024",
    "stability.loss_scale_growth_updates": "100",
    "evaluation.every_updates": "3",
    "evaluation.patience": "9",
    "evaluation.generate_rows": "1",
    "evaluation.generate_batch": "3",
    "evaluation.max_new_tokens": "4",
    "evaluation.samples": "1",
    "checkpoint.every_updates": "7",
    "checkpoint.keep": "2",
    "checkpoint.on_failure": "stop",
    "record.text": "full",
    "record.machine_every_s": "2.5",
    "record.probe_every_updates": "2",
    "record.capture_updates": "5",
    "record.capsules": "3",
    "record.capsules_gib": "1",
    "tracking.to": "wandb",
    "tracking.project": "other",
    "tracking.wandb_mode": "offline",
    "tracking.report": "full",
    "tracking.webhook": "https://localhost/alarms",
}
OF_FUSED = {
    "execution.engine": "fused",
    "memory.profile": "min",
    "memory.host_gib": "1",
    "memory.base": "gpu",
}
STARTS = ("run", "resume", "preset")  # say where a run lies and how it starts


def test_every_field_that_may_change_has_its_other_value_here() -> None:
    may = {
        name
        for name in field_names()
        if not computes(name) and name.partition(".")[0] not in STARTS
    }
    assert may - {"model.init_adapter"} == OTHERWISE.keys() | OF_FUSED.keys()


def assert_told(run: Any, before: dict[str, bytes], names: Any) -> None:
    """Each field stands with both values in the event, the header, and both config files."""
    folder = run.folder
    (event,) = changed_events(folder)
    kept = files(folder)["config_000002.yaml"]
    assert kept == before["config.yaml"]
    assert "config_000002.yaml" in event["message"] and event["update"] == 2
    told = event["details"]["fields"]
    assert told.keys() >= set(names)
    for name in names:
        old, new = value_of(folder, name, "config_000002.yaml"), value_of(folder, name)
        assert [old, new] == told[name] and old != new, name
        section, _, field = name.partition(".")
        assert getattr(getattr(run.config, section), field) in (new, tuple(as_list(new))), name
        assert any(line.startswith(f"changed   {name}: ") for line in run.header), name
        assert f"{name}: " in event["message"], name


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_every_setting_that_changed_is_told_by_files_event_and_header(
    begun, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(starting, "check_tracking", lambda _: None)  # nothing is tracked here
    monkeypatch.setattr(build, "make_tracker_observer", lambda *_, **__: None)
    before = files(begun)
    words = [f"{name}={value.replace('CACHE', str(tmp_path))}" for name, value in OTHERWISE.items()]
    try:
        run = resumed(begun, *words)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_told(run, before, OTHERWISE)
    plans = [json.loads(files(begun)[name]) for name in ("plan_000002.json", "plan.json")]
    assert files(begun)["plan_000002.json"] == before["plan.json"]
    facts = [(plan["contract"]["mixed precision"], plan["pass_tokens"]) for plan in plans]
    assert facts == [("no", None), ("bf16", 200)]


@needs_triton
def test_another_engine_and_its_memory_are_told(begun) -> None:
    before = files(begun)
    run = resumed(begun, *(f"{name}={value}" for name, value in OF_FUSED.items()))
    assert_told(run, before, OF_FUSED)
    plans = [json.loads(files(begun)[name]) for name in ("plan_000002.json", "plan.json")]
    assert [plan["contract"]["engine"] for plan in plans] == ["peft", "fused"]


def test_a_resume_without_changes_rewrites_nothing(begun) -> None:
    before = files(begun)
    resumed(begun)
    assert changed_events(begun) == []
    after = files(begun)
    assert after.keys() == before.keys()
    assert (after["config.yaml"], after["plan.json"]) == (
        before["config.yaml"],
        before["plan.json"],
    )


def test_what_a_start_left_is_kept_however_often_the_run_resumes_at_one_place(begun) -> None:
    first = files(begun)["config.yaml"]
    resumed(begun, "checkpoint.keep=5")
    second = files(begun)["config.yaml"]
    resumed(begun, "checkpoint.keep=6")
    after = files(begun)
    assert (after["config_000002.yaml"], after["config_000002_2.yaml"]) == (first, second)
    assert [event["details"]["kept"] for event in changed_events(begun)] == [
        ["config_000002.yaml"],
        ["config_000002_2.yaml"],
    ]
    assert keep_aside(begun / "config_000002.yaml", 9) == "config_000002_000009.yaml"
    assert keep_aside(begun / "config_000002.yaml", 9) == "config_000002_000009.yaml"  # once


def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(begun) -> None:
    before = files(begun)
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.01 and now is 0\.5: leave it"):
        resumed(begun, "optimizer.lr=0.5", "execution.precision=bf16")
    assert files(begun) == before


def test_another_machine_is_told_and_the_first_ones_env_is_kept(begun) -> None:
    env = json.loads(files(begun)["env.json"])
    env["packages"]["torch"], env["driver"] = "1.0", "000.1"
    (begun / "env.json").write_text(json.dumps(env))
    run = resumed(begun)
    (event,) = changed_events(begun)
    assert f"packages.torch: 1.0 -> {torch.__version__.partition('+')[0]}" in event["message"]
    assert any(line.startswith("changed   driver: 000.1 -> ") for line in run.header)
    assert json.loads(files(begun)["env_000002.json"]) == env
    assert event["details"]["kept"] == ["env_000002.json"]


def test_what_an_older_file_does_not_know_is_no_change() -> None:
    new = {"updates": 6, "contract": {"engine": "peft", "devices": 2}, "pass_tokens": None}
    assert plan_changes({"updates": 6}, new) == {}
    assert plan_changes({"contract": {"devices": 1}}, new) == {"devices": (1, 2)}
    assert machine_changes({}, {"git": "a"}) == {}
    assert machine_changes({"git": None}, {"git": "a", "python": "3"}) == {"git": (None, "a")}


# Replay


def test_a_replay_takes_the_settings_that_the_update_ran_with(begun, capsys) -> None:
    from accelerate.state import AcceleratorState

    from glassloop.cli.__main__ import main

    run = resumed(begun, "execution.precision=bf16", close=False)
    run.tell(update_once(run, 3))
    run.close_observers()
    shutil.rmtree(begun / "capsules")
    found = {}
    for update in (2, 3):
        AcceleratorState._reset_state(True)
        capsys.readouterr()
        assert main(["replay", str(begun), "--update", str(update), "--json"]) == 0
        found[update] = json.loads(capsys.readouterr().out)
    assert all(one["bit_for_bit"] for one in found.values())
    assert "update_000002" in found[3]["origin"] and "the beginning" in found[2]["origin"]
    assert found[3]["notes"] == ["updates up to 2 ran with other settings than config.yaml has"]


def test_no_file_outside_the_run_stands_for_its_config(tmp_path) -> None:
    record = {"attempt": 1, "update": 2}
    assert file_of(tmp_path, record, "config.yaml") == "config.yaml"
    kept = ["../config_000002.yaml", "config_000002.yaml/../x", 7, "plan_000002.json"]
    event = Event(2, "changed", "precision", details={"kept": kept})
    (tmp_path / "events.jsonl").write_text(to_json(event) + "\n")
    assert file_of(tmp_path, record, "config.yaml") == "config.yaml"
    assert file_of(tmp_path, record, "plan.json") == "plan_000002.json"
    assert file_of(tmp_path, {"attempt": 1, "update": 3}, "plan.json") == "plan.json"
    assert file_of(tmp_path, {"attempt": 2, "update": 1}, "plan.json") == "plan.json"


def test_what_a_strangers_files_say_of_the_machine_is_obeyed_by_no_terminal(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begun / "env.json"
    env = json.loads(path.read_text())
    env["packages"] |= {"\x1b]0;evil\x07": "1", "torch": "\x1b[2J\x7f\u202e9"}
    path.write_text(json.dumps(env | {"driver": ["\x9b31m"]}))
    capsys.readouterr()
    run = resumed(begun, start=False, close=False)
    run.begin()
    run.start()
    run.close_observers()
    (event,) = changed_events(begun)
    told = [*(line for line in run.header if line.startswith("changed")), event["message"]]
    assert all(line.isprintable() for line in told)
    shown = capsys.readouterr().out
    assert set(filter(lambda char: not char.isprintable(), shown)) == {"\n"}
    for text in (told[-1], shown):
        assert "packages.\\x1b]0;evil\\x07: 1 -> null" in text
        assert 'packages.torch: "\\u001b[2J\\u007f\\u202e9" -> ' in text
        assert 'driver: ["\\u009b31m"] -> ' in text


def test_odd_characters_of_a_strangers_run_are_spelled_out() -> None:
    assert in_words("\x1b[31mred") == '"\\u001b[31mred"'
    assert [in_words(value) for value in ("fp32", None, True, [1, 2])] == [
        "fp32",
        "null",
        "true",
        "[1, 2]",
    ]
