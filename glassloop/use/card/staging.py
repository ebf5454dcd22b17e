"""The folder that is published: named files without local paths or secrets."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from glassloop.use.card.facts import Facts
from glassloop.use.card.markdown import card, curves
from glassloop.use.trained import adapter_config

ADAPTER_FILES = ("adapter_model.safetensors",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
)
MERGED_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "glassloop_merge.json",
    "Modelfile",
)
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Where something lay on this machine.
LOCAL_FIELDS = ("name_or_path", "_name_or_path", "is_local", "local_files_only")
# Each names Python code that a reader who trusts the repository would run.
CODE_FIELDS = ("auto_map", "auto_mapping", "custom_pipelines", "custom_generate")
JSON_FILES = ("tokenizer_config.json", "config.json", "generation_config.json")
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
LOOKED_AT = 64 << 20  # bytes of a file that are searched: texts are smaller, weights hold no text


def is_weights(name: str) -> bool:
    """Tell if a file decides what a repository loads."""
    return (
        name in (*ADAPTER_FILES, "adapter_config.json", "model.safetensors.index.json")
        or SHARD.fullmatch(name) is not None
    )


def stage(facts: Facts, folder: Path, repo: str, merged: Path | None = None) -> list[str]:
    """Fill `folder` with all that is published; return the names.

    Weights are hard links if the disk allows it; what a person might edit is a copy. Fields that
    name code are published only if the command line trusts it.

    Raises:
        ValueError: a file seems to hold a secret of this environment, or is damaged; names the
            file, not the secret.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = facts.trained.checkpoint
    source = checkpoint if merged is None else merged
    wanted = (*ADAPTER_FILES, *TOKENIZER_FILES) if merged is None else MERGED_FILES
    for path in sorted(source.iterdir()):
        if path.name in wanted or (merged is not None and SHARD.fullmatch(path.name)):
            (_link if is_weights(path.name) else shutil.copyfile)(path, folder / path.name)
    if merged is None:
        settings = adapter_fields(facts)
        _write(folder / "adapter_config.json", json.dumps(settings, indent=1) + "\n")
    left_out = LOCAL_FIELDS
    if not facts.trained.config.model.trust_remote_code:
        left_out += CODE_FIELDS
    for name in JSON_FILES:
        if (folder / name).is_file():
            fields = _object(folder / name, source / name)
            kept = {key: value for key, value in fields.items() if key not in left_out}
            _write(folder / name, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    _write(folder / "README.md", card(facts, repo))
    if (picture := curves(facts)) is not None:
        _write(folder / "curves.svg", picture)
    names = sorted(path.name for path in folder.iterdir())
    check_no_secret(folder, names)
    return names


def adapter_fields(facts: Facts) -> dict[str, Any]:
    """Fields of the published adapter_config.json: PEFT's own, none that names code."""
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)} - set(CODE_FIELDS)
    settings = adapter_config(facts.trained)
    kept = {key: value for key, value in settings.items() if key in (*known, "peft_version")}
    base = {"base_model_name_or_path": facts.base_name, "revision": facts.base_commit}
    return kept | base


def _object(path: Path, source: Path) -> dict[str, Any]:
    """A JSON file's object. `source`: the file's name for an error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON ({error}): put back a copy") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds no fields: put back a copy")
    return found


def check_no_secret(folder: Path, names: list[str]) -> None:
    """Raise ValueError for a file that holds a token or secret.

    A token is known by its form, a secret by the name of its environment variable.
    """
    values = [
        value.encode()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= 8
    ]
    for name in names:
        with open(folder / name, "rb") as file:
            data = file.read(LOOKED_AT)
        if SECRET.search(data) or any(value in data for value in values):
            raise ValueError(
                f"{name} holds what looks like a secret of this environment: nothing was "
                "published; see where it comes from"
            )


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _write(path: Path, text: str) -> None:
    """Write a new file, since a hard link's source must not change."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
