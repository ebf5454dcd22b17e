"""`glassloop push`: what is published and what never is, private by default, a card that says what the run's records say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml
from trained_runs import SECRET_ROW, copy_of, finished_run

from glassloop.card.curves import svg
from glassloop.card.facts import is_hub_id
from glassloop.card.staging import check_no_secret
from glassloop.card.upload import upload
from glassloop.cli.__main__ import main

SYSTEM = "You are Ferdinand, the clerk of nobody."
PUBLISHED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "curves.svg"}
PUBLISHED |= {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    made = finished_run(
        tmp_path_factory.mktemp("push"), tiny_llama, data={"system": SYSTEM, "max_tokens": 480}, evaluation={"samples": 1}
    )
    assert main(["evaluate", str(made), "--max-new-tokens", "4"]) == 0
    return made


@pytest.fixture(scope="module")
def dry(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dry") / "out"
    assert main(["push", str(run), "me/my-model", "--dry-run", str(folder)]) == 0
    return folder


class Hub:
    """Stands in for HfApi."""

    def __init__(self, private: bool | None = None) -> None:
        self.private, self.calls = private, []

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private))
        self.private = private if self.private is None else self.private

    def model_info(self, _repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        sent = sorted(path.name for path in Path(folder_path).iterdir() if path.name in allow_patterns)
        self.calls.append(("upload", repo_id, sent, commit_message))


def test_only_named_files_go_and_none_holds_a_row_a_path_or_the_system_prompt(run, dry):
    assert {path.name for path in dry.iterdir()} == PUBLISHED
    assert any(SECRET_ROW in path.read_text() for path in run.rglob("*.json*") if path.is_file())  # the run does hold it
    for path in dry.iterdir():
        data = path.read_bytes()
        for never in (
            SECRET_ROW.encode(),
            b"Ferdinand",
            str(run.parent).encode(),
            b"/tmp/",
            str(Path.home()).encode() + b"/",
            b"train:",
        ):
            assert never not in data, f"{path.name} holds {never!r}"
    assert (dry / "adapter_model.safetensors").read_bytes() == next(
        run.glob("checkpoints/*/adapter_model.safetensors")
    ).read_bytes()


def test_the_card_says_what_the_records_say(run, dry):
    text = (dry / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft" and "base_model" not in front and "license" not in front
    found = json.loads(next((run / "evaluated").glob("*.json")).read_text())
    for side in ("base", "adapter"):
        assert f"{found['counts'][side]['loss_nats']:.4f}" in text
    loss = next(score for score in found["scores"] if score["name"] == "loss_nats")
    assert f"[{loss['difference'][0]:+.3f}, {loss['difference'][1]:+.3f}]" in text
    for said in (
        "r = 4, alpha = 8",
        "18 rows make 5 updates an epoch",
        "6 labelled rows tell little",
        "one run",
        "system prompt stood before",
    ):
        assert said in text, said
    assert text.count("not known to glassloop") == 2
    assert "## What was not measured" in text and "{" not in text.partition("# my-model")[2].replace("{optimizer}", "")


def test_numbers_of_other_weights_do_not_get_in(run, tmp_path):
    copy = copy_of(run, tmp_path / "copy")
    for path in (copy / "evaluated").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": "0" * 16}))
    assert main(["push", str(copy), "me/my-model", "--dry-run", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "No interval" in text and "was not run on these weights" in text


def test_the_curves_are_the_runs_and_well_formed(dry):
    root = ElementTree.parse(dry / "curves.svg").getroot()
    lines = [node.get("points") for node in root.iter() if node.tag.endswith("polyline")]
    assert [len(points.split()) for points in lines] == [2, 2, 2]  # 2 updates, held-out before and after, 2 norms
    assert "no finite value" in svg([("a & b", [("x", [(1, float("nan"))])])]) and "a &amp; b" in svg([("a & b", [])])


def test_private_unless_asked_and_never_into_a_repository_that_is_public(run, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert main(["push", str(run), "me/my-model"]) == 0
    assert hub.calls[0] == ("create", "me/my-model", True)
    assert set(hub.calls[1][2]) == PUBLISHED
    assert "private" in capsys.readouterr().out
    hub = Hub(private=False)
    assert main(["push", str(run), "me/my-model"]) == 2
    assert "is public" in capsys.readouterr().err and [call[0] for call in hub.calls] == ["create"]
    assert main(["push", str(run), "me/my-model", "--public"]) == 0
    assert hub.calls[-1][0] == "upload"
    assert not list(Path().glob(".push-*"))


def test_what_looks_like_a_secret_stops_it(dry, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("the key is " + "hf_" + "a" * 34)
    with pytest.raises(ValueError, match=r"README\.md"):
        check_no_secret(tmp_path, ["README.md"])
    monkeypatch.setenv("MY_API_KEY", "adamw_8bit, peak")  # the card holds these words
    assert main(["push", str(run), "me/my-model", "--dry-run", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "secret" in told and "adamw_8bit" not in told


def test_merged_weights_go_with_their_table_and_only_with_their_own_adapter(run, tmp_path, capsys, tiny_llama):
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert main(["push", str(run), "me/m", "--merged", str(tmp_path / "merged"), "--dry-run", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "tokenizer.json"} <= names
    assert not {"SERVE.txt", "adapter_model.safetensors"} & names
    text = (tmp_path / "out" / "README.md").read_text()
    assert "What merging changed" in text and "library_name: transformers" in text
    facts = json.loads((tmp_path / "merged" / "glassloop_merge.json").read_text())
    (tmp_path / "merged" / "glassloop_merge.json").write_text(json.dumps(facts | {"adapter": "1" * 16}))
    assert main(["push", str(run), "me/m", "--merged", str(tmp_path / "merged"), "--dry-run", str(tmp_path / "two")]) == 2
    assert "another adapter" in capsys.readouterr().err


def test_refusals_name_what_and_the_cure(run, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    for words, message in (
        ([tmp_path / "none", "me/m"], "no folder"),
        ([tmp_path, "me/m"], "neither a run"),
        ([run, "no-owner"], "owner/name"),
        ([run, "me/m", "--dry-run", taken], "exists"),
        ([run, "me/m", "--merged", tmp_path / "nothing"], "no folder"),
        ([run, "me/m", "--merged", taken], "glassloop_merge.json"),
    ):
        assert main(["push", *map(str, words)]) == 2
        assert message in capsys.readouterr().err

    class Stranger(Hub):
        def whoami(self):
            raise RuntimeError("401")

    with pytest.raises(ValueError, match="hf auth login"):
        upload(taken, [], "me/m", public=False, message="", api=Stranger())


def test_hub_ids_are_told_from_paths():
    assert is_hub_id("owner/name") and is_hub_id("owner/name-1.5")
    assert not any(map(is_hub_id, ("smollm2", "/models/x", "./a/b", "~/a", "a/b/c", "tests/cpu", "data/calls.jsonl")))
