"""A resumed run's folder tells the truth about every setting that may change, and what moved."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from glassloop.config.arguments import ConfigError, parse
from glassloop.config.names import field_names
from glassloop.loop import build, starting
from glassloop.loop.changed import in_words, keep_aside, machine_changes, plan_changes
from glassloop.record.jsonl import read_jsonl
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
    "evaluation.generate_rows": "1",
    "evaluation.max_new_tokens": "4",
    "evaluation.samples": "1",
    "checkpoint.every_updates": "7",
    "checkpoint.keep": "2",
    "checkpoint.on_failure": "stop",
    "record.text": "full",
    "record.probe_every_updates": "2",
    "record.capture_updates": "5",
    "record.capsules": "3",
    "record.capsules_gib": "1",
    "tracking.to": "wandb",
    "tracking.project": "other",
    "tracking.wandb_mode": "offline",
}
OF_FUSED = {
    "execution.engine": "fused",
    "memory.profile": "min",
    "memory.host_gib": "1",
    "memory.base": "gpu",
}
STARTS = ("run", "resume", "preset")  # say where a run lies and how it starts


@pytest.fixture
def begun(run_of) -> Path:
    """A run that has done two updates in fp32 and saved after the second."""
    run = run_of(
        data={"heldout": 0.2},
        schedule={"updates": 6, "warmup_updates": 1},
        execution={"precision": "fp32", "checkpointing": False},
    )
    for update in (1, 2):
        run.tell(update_once(run, update))
    run.save(2)
    run.close_observers()
    return run.folder


def resumed(folder: Path, *words: str, start: bool = True, close: bool = True) -> Any:
    """Built anew, as a process of its own would, up to the events of its start."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    run = build.build_run(parse(["--resume", str(folder), *words]))
    if start:
        run.evaluate = lambda update: None
        run.start()
    if close:
        run.close_observers()
    return run


def changed_events(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "changed"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def value_of(folder: Path, name: str, file: str = "config.yaml") -> Any:
    section, _, field = name.partition(".")
    return yaml.safe_load((folder / file).read_text())[section][field]


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


# From the beginning


def test_a_run_that_begins_again_may_not_compute_something_else(begun) -> None:
    before = files(begun)
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.01 and now is 0\.5.*a new run$"):
        resumed(begun, "--at", "0", "optimizer.lr=0.5")
    assert files(begun) == before
    resumed(begun, "--at", "0", "execution.precision=bf16")
    assert value_of(begun, "execution.precision") == "bf16"
    assert value_of(begun, "execution.precision", "config_000000.yaml") == "fp32"


def test_a_run_that_begins_again_with_other_ranks_needs_reshape(begun) -> None:
    plan = json.loads((begun / "plan.json").read_text())
    (begun / "plan.json").write_text(json.dumps(plan | {"ranks": 2}))
    with pytest.raises(
        ValueError, match=r"began with 2 ranks, this start has 1: start 2 .*reshape"
    ):
        resumed(begun, "--at", "0")


# What moved


def test_data_that_moved_are_accepted_if_their_rows_are_the_same(begun, tmp_path) -> None:
    old = value_of(begun, "data.source")
    new = str(shutil.move(old, tmp_path / "elsewhere.jsonl"))
    run = resumed(begun, f"data.source={new}")
    assert run.first_update == 3
    (event,) = changed_events(begun)
    assert f"data.source: {old} -> {new}" in event["message"]
    assert "(data.source: rows and base are the same by their digests)" in event["message"]
    assert value_of(begun, "data.source") == new
    lines = Path(new).read_text().splitlines()
    Path(new).write_text("\n".join([*lines[:-1], lines[-1].replace("a", "b")]) + "\n")
    with pytest.raises(ValueError, match=r"the rows are not those that the run began with"):
        resumed(begun, f"data.source={new}")


def test_without_a_digest_in_its_plan_a_runs_data_stay_where_they_were(begun, tmp_path) -> None:
    (begun / "plan.json").unlink()
    new = shutil.copy(value_of(begun, "data.source"), tmp_path / "copy.jsonl")
    with pytest.raises(ValueError, match=r"data\.source was .* and now is .*copy\.jsonl"):
        resumed(begun, f"data.source={new}")


def test_a_base_that_moved_is_accepted_and_another_one_is_not(begun, tmp_path) -> None:
    base = shutil.copytree(value_of(begun, "model.id"), tmp_path / "base")
    assert resumed(begun, f"model.id={base}").first_update == 3
    assert value_of(begun, "model.id") == str(base)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"it was made on the base \w+, .*set model\.id"):
        resumed(begun)


# Which run


def test_a_checkpoints_folder_resumes_its_run_there(begun) -> None:
    run = resumed(begun / "checkpoints/update_000002", start=False)
    assert (run.folder, run.config.resume.at, run.first_update) == (begun, 2, 3)
    again = parse(["--resume", f"{begun}/checkpoints/update_000002/", "--at", "2"])
    assert again.resume.run == str(begun)
    with pytest.raises(
        ConfigError, match=r"names the checkpoint after 2 updates and resume\.at = 4"
    ):
        parse(["--resume", str(begun / "checkpoints/update_000002"), "--at", "4"])


def test_latest_is_the_run_that_was_started_last(tmp_path) -> None:
    import os

    for age, name in enumerate(("new", "old", "oldest")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.yaml", "env.json"):
            (folder / file).write_text("seed: 7\n")
            os.utime(folder / file, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "oldest/env.json", (2e9, 2e9))  # resumed since
    runs = f"run.dir={tmp_path}"
    assert parse(["--resume", "latest", runs]).resume.run == str(tmp_path / "oldest")
    with pytest.raises(ConfigError) as caught:
        parse(["--resume", str(tmp_path / "nowhere"), runs])
    assert str(caught.value) == (
        f"resume.run = {tmp_path}/nowhere: there is no such folder; "
        f"name one of the runs in {tmp_path}: {tmp_path}/oldest, {tmp_path}/new, {tmp_path}/old"
    )
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds no run \(no config.yaml\); name one"):
        parse(["--resume", str(tmp_path)])


def test_without_any_run_the_folder_that_was_looked_in_is_named(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for named in ("latest", str(tmp_path / "empty")):
        with pytest.raises(
            ConfigError, match=rf"no run.*there are no runs in {tmp_path} \(run.dir"
        ):
            parse(["--resume", named, f"run.dir={tmp_path}"])


def test_a_resumed_run_stays_in_its_folder(begun) -> None:
    with pytest.raises(ConfigError, match=r"run\.name = other: a resumed run stays in its folder"):
        parse(["--resume", str(begun), "run.name=other"])


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


def test_odd_characters_of_a_strangers_run_are_spelled_out() -> None:
    assert in_words("\x1b[31mred") == '"\\u001b[31mred"'
    assert [in_words(value) for value in ("fp32", None, True, [1, 2])] == [
        "fp32",
        "null",
        "true",
        "[1, 2]",
    ]
