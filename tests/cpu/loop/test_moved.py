"""A run begins again, finds what moved, and is found by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from resumed_runs import changed_events, files, resumed, value_of

from glassloop.config.arguments import ConfigError, parse

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
