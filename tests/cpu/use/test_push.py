"""`glassloop push`: published files, privacy, and a card from the records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError
from trained_runs import SECRET_ROW, copy_of, prompt_of, signed_anew

from glassloop.cli.__main__ import main
from glassloop.use.card.curves import svg
from glassloop.use.card.facts import is_hub_id
from glassloop.use.card.staging import check_no_secret
from glassloop.use.card.upload import login
from glassloop.use.loaded import load
from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

PUBLISHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "curves.svg",
}
PUBLISHED |= {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def run(pushed: Path) -> Path:
    return pushed


@pytest.fixture(scope="module")
def dry(pushed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dry") / "out"
    assert main(["push", str(pushed), "me/my-model", "--dry-run", str(folder)]) == 0
    return folder


class Hub:
    """Stands in for HfApi."""

    def __init__(self, private: bool | None = None, files: tuple[str, ...] = ()) -> None:
        self.private, self.files, self.calls = private, files, []

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private))
        self.private = private if self.private is None else self.private

    def model_info(self, _repo):
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, _repo):
        return list(self.files)

    def upload_folder(
        self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message
    ):
        self.deleted = delete_patterns
        sent = sorted(
            path.name for path in Path(folder_path).iterdir() if path.name in allow_patterns
        )
        self.calls.append(("upload", repo_id, sent, commit_message))


def test_only_named_files_go_and_none_holds_a_row_a_path_or_the_system_prompt(run, dry):
    assert {path.name for path in dry.iterdir()} == PUBLISHED
    assert any(
        SECRET_ROW in path.read_text() for path in run.rglob("*.json*") if path.is_file()
    )  # the run does hold it
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
    assert "## What was not measured" in text and "{" not in text.partition("## Training data")[2]


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
    assert [len(points.split()) for points in lines] == [
        2,
        2,
        2,
    ]  # 2 updates, held-out before and after, 2 norms
    assert "no finite value" in svg(
        [("a & b", [("x", [(1, float("nan"))])])]
    ) and "a &amp; b" in svg([("a & b", [])])


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
    assert hub.calls[-1][0] == "upload" and "(public)" in capsys.readouterr().out
    hub = Hub(private=True)
    assert main(["push", str(run), "me/my-model", "--public"]) == 0
    out = capsys.readouterr().out
    assert "(private)" in out and "stays so" in out  # what it is, not what was asked
    assert not list(Path().glob(".push-*"))


def test_weights_of_an_earlier_upload_are_not_left_to_be_loaded_with_new_ones(
    run, monkeypatch, capsys
):
    old = (
        "README.md",
        "notes.txt",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    )
    hub = Hub(files=(*old, "adapter_config.json", "old/model.safetensors"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert main(["push", str(run), "me/my-model"]) == 0
    assert hub.deleted == [
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
    assert "left from an earlier upload" in capsys.readouterr().out
    hub = Hub(files=("README.md", "adapter_model.safetensors"))
    assert main(["push", str(run), "me/my-model"]) == 0
    assert hub.deleted is None


def test_the_cards_code_loads_what_was_trained(run, dry, tiny_llama, capsys):
    text = (dry / "README.md").read_text()
    code = text.partition("```python")[2].partition("```")[0]
    code = (
        code.replace("me/my-model", str(dry))
        .replace(f"PATH/TO/{tiny_llama.name}", str(tiny_llama))
        .replace("=512", "=4")
    )
    found: dict[str, Any] = {}
    exec(code, found)  # a reader of the card would run it so
    assert capsys.readouterr().out.strip()
    trained = open_trained(run)
    tokenizer = load_tokenizer_of(trained)
    ids = prompt_of(template_of(trained, tokenizer), "...")
    assert found["prompt"]["input_ids"][0].tolist() == ids
    loaded = load(trained, torch.device("cpu"))
    with torch.no_grad():
        ours = loaded.hf(input_ids=torch.tensor([ids])).logits
        theirs = found["model"](input_ids=torch.tensor([ids])).logits
        with loaded.hf.disable_adapter():
            base = loaded.hf(input_ids=torch.tensor([ids])).logits
    assert (ours - theirs).norm() < 0.02 * (ours - base).norm()
    assert "Read this phone call" in text


def test_the_card_names_the_checkpoint_without_the_words_of_a_terminal(run, tmp_path):
    copy = copy_of(run, tmp_path / "copy")
    newer = copy_of(copy / "checkpoints" / "update_000002", copy / "checkpoints" / "update_000003")
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps(state | {"update": 3}))
    signed_anew(newer)
    assert main(["push", str(copy), "me/my-model", "--dry-run", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "after 2 updates, the best by held-out loss of the checkpoints kept" in text
        and "--at" not in text
    )


def test_a_dry_run_can_be_edited_without_touching_the_run_and_is_whole_or_not_there(
    run, dry, tmp_path, monkeypatch, capsys
):
    checkpoint = run / "checkpoints" / "update_000002"
    for path in dry.iterdir():
        if path.suffix != ".safetensors" and (checkpoint / path.name).exists():
            assert not path.samefile(checkpoint / path.name), path.name
    monkeypatch.setenv("MY_API_KEY", "adamw_8bit, peak")
    assert main(["push", str(run), "me/my-model", "--dry-run", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.iterdir())
    assert main(["push", str(run), "me/my-model", "--dry-run", "/proc/out"]) == 2
    assert "--dry-run /proc/out cannot be written" in capsys.readouterr().err


def test_who_asks_is_known_before_anything_is_made(run, monkeypatch, capsys):
    class Nobody(Hub):
        def whoami(self):
            raise LocalTokenNotFoundError("Token is required, see https://")

    monkeypatch.setattr("huggingface_hub.HfApi", Nobody)
    monkeypatch.setattr(
        "glassloop.use.card.staging.stage",
        lambda *_args: pytest.fail("made before the hub was asked"),
    )
    assert main(["push", str(run), "me/my-model"]) == 2
    told = capsys.readouterr().err
    assert "no token" in told and "hf auth login" in told and "https" not in told


def test_what_looks_like_a_secret_stops_it(dry, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("the key is " + "hf_" + "a" * 34)
    with pytest.raises(ValueError, match=r"README\.md"):
        check_no_secret(tmp_path, ["README.md"])
    monkeypatch.setenv("MY_API_KEY", "adamw_8bit, peak")  # the card holds these words
    assert main(["push", str(run), "me/my-model", "--dry-run", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "secret" in told and "adamw_8bit" not in told


def test_refusals_name_what_and_the_cure(run, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    for words, message in (
        ([tmp_path / "none", "me/m"], "no folder"),
        ([tmp_path, "me/m"], "neither a run"),
        ([run, "no-owner"], "owner/name"),
        ([run, "me/a--b"], "owner/name"),
        ([run, "me/a.git"], "owner/name"),
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
        login(Stranger())


def test_hub_ids_are_told_from_paths():
    assert is_hub_id("owner/name") and is_hub_id("owner/name-1.5")
    assert not any(
        map(
            is_hub_id,
            ("smollm2", "/models/x", "./a/b", "~/a", "a/b/c", "tests/cpu", "data/calls.jsonl"),
        )
    )
