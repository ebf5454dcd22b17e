"""A shared page holds no folder, name or secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import write_run

from glassloop.cli.__main__ import main
from glassloop.disk.publish import write_json
from glassloop.record.reading import read_run
from glassloop.report.comparing import compare
from glassloop.report.page import page
from glassloop.report.payload import payload
from glassloop.report.sharing import shared, without_names

HOMES = ("/home/ottoline", "/Users/ottoline", "/var/home/ottoline", "C:\\Users\\ottoline")
HEX = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "OpenAI": "sk-proj-" + "aB3d" * 10,
    "GitHub": "ghp_" + "aB3" * 12,
    "GitHub, fine": "github_pat_" + "aB3" * 12,
    "Weights & Biases": "wandb_v1_" + "aB3" * 8,
    "Amazon": "AKIA" + "AB3D" * 4,
    "Slack": "xoxb-" + "1234567890-" * 2 + "aB3" * 4,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make somebody else's run, with folders in every file."""
    monkeypatch.setenv("HOME", "/data/people/quatermain")
    monkeypatch.setenv("USER", "quatermain")
    folder = write_run(tmp_path / "ottoline_run-quatermain", updates=8, layers=1)
    config = json.loads((folder / "config.yaml").read_text())
    config["model"]["id"] = f"{HOMES[0]}/models/tiny"
    config["data"]["source"] = "file:///home/ottoline/my calls.jsonl"
    config["run"]["dir"] = "/data/people/quatermain/runs"
    write_json(folder / "config.yaml", config)
    plan = json.loads((folder / "plan.json").read_text())
    plan["contract"]["base"] = f"{HOMES[1]}/models/tiny"
    write_json(folder / "plan.json", plan)
    env = json.loads((folder / "env.json").read_text())
    write_json(folder / "env.json", env | {"python_at": f"{HOMES[2]}/venv/bin/python"})
    events = (folder / "events.jsonl").read_text().splitlines()
    event = json.loads(events[0])
    event |= {
        "message": f"reads {HOMES[3]}\\calls.csv, then /data/people/quatermain/x; by ottoline",
        "command": "glassloop replay ~/runs/mine --update 3",
    }
    (folder / "events.jsonl").write_text("\n".join([json.dumps(event), *events[1:]]) + "\n")
    return folder


def test_a_shared_page_holds_no_folder_and_no_name(folder: Path) -> None:
    whole = page(payload(read_run(folder), text=True))
    shared = page(payload(read_run(folder), text=False))
    for word in ("ottoline", "quatermain", "/home/", "/Users/", "/data/people", str(folder.parent)):
        assert word in whole
        assert word not in shared
    data = payload(read_run(folder), text=False)
    assert data["config"]["model.id"] == "(...)/tiny"  # what it is stays known
    assert data["events"][0]["command"] == "glassloop replay (...)/mine --update 3"
    assert data["title"] == "(user)_run-(user)"


def test_a_shared_comparison_holds_no_row_prompt_folder_or_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", updates=8, layers=1)
    config = json.loads((folder / "config.yaml").read_text())
    config["data"]["system"] = "You are Dr. Watson."
    write_json(folder / "config.yaml", config)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"row_id": "patient-4711"}
    (folder / "rows.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    hidden = ("patient-4711", "Watson", "ottoline", "quatermain", "/home/", str(tmp_path))
    told = {}
    for more in ([], ["--no-text"]):
        out = tmp_path / "page.html"
        words = ["compare", str(folder), str(other), "--out", str(out), *more]
        assert main(words) == 0
        said = capsys.readouterr().out.replace(str(out), "")
        told[bool(more)] = said + out.read_text(encoding="utf-8")
    for word in hidden[:4]:
        assert word in told[False]
    for word in hidden:
        assert word not in told[True].replace("\n", "")
    for still in ("(...)/tiny", "data.system", "(left out)", "(user)_run", "rows (left out)"):
        assert still in told[True]


def test_two_system_prompts_are_two_sides_in_a_shared_comparison_too(tmp_path: Path) -> None:
    runs = []
    for prompt in ("Be brief.", "Be polite."):
        made = write_run(tmp_path / prompt[3:6], updates=8, layers=1)
        config = json.loads((made / "config.yaml").read_text())
        config["data"]["system"] = prompt
        write_json(made / "config.yaml", config)
        runs.append(read_run(made))
    found = shared(compare(runs))
    assert len(found.sides) == 2
    assert dict(found.differences)["data.system"] == ("(left out)", "(left out)")


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_token_that_an_older_run_recorded_is_in_no_comparison(
    folder: Path, tmp_path: Path, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", updates=8, layers=1)
    config = json.loads((folder / "config.yaml").read_text())
    config["data"]["source"] = f"https://x.org/calls?revision={token}"
    write_json(folder / "config.yaml", config)
    out = tmp_path / "page.html"
    assert main(["compare", str(folder), str(other), "--out", str(out)]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert token not in said + out.read_text(encoding="utf-8")
    assert "hidden" in said


def test_what_is_no_folder_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/max")
    monkeypatch.setenv("USER", "max")
    said = {
        "a": "optimizer.max_grad_norm: 1.0 s/update, 3 / 4, checkpoints/best.json, and/or </b>",
        "b": "https://example.com/max/x",
        "columns": {"f32": "/home/max+/root/max="},
    }
    changed = without_names(said)
    assert changed["a"] == said["a"]
    assert changed["b"] == "https://example.com/(user)/x"
    assert changed["columns"] == said["columns"]  # numbers, packed


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("text", [True, False])
def test_a_token_that_an_older_run_recorded_is_on_no_page(
    folder: Path, token: str, text: bool
) -> None:
    config = json.loads((folder / "config.yaml").read_text())
    config["data"]["source"] = f"https://x.org/calls?revision={token}"
    config["tracking"] = {"project": HEX}
    config["model"]["revision"] = HEX  # a commit
    write_json(folder / "config.yaml", config)
    with (folder / "events.jsonl").open("a") as file:
        event = {"update": 8, "kind": "warning", "message": f"401 for {token}, api_key={HEX}"}
        file.write(json.dumps(event | {"command": f"curl -u me:{token}"}) + "\n")
    data = payload(read_run(folder), text=text)
    made = page(data)
    assert token not in made
    assert data["config"]["model.revision"] == HEX
    assert made.count(HEX) == 1
