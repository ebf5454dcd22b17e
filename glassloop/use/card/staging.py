"""The folder that is published: named files only, paths of this machine taken out, and nothing that looks like a secret."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from glassloop.use.card.facts import Facts
from glassloop.use.card.text import card, curves
from glassloop.use.trained import adapter_config

ADAPTER_FILES = ("adapter_model.safetensors",)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "vocab.txt",
)  # fmt: skip
MERGED_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "glassloop_merge.json",
    "Modelfile",
)
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
LOCAL_FIELDS = (
    "name_or_path",
    "_name_or_path",
    "is_local",
    "local_files_only",
)  # where something lay on this machine
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
LOOKED_AT = 64 << 20  # bytes of a file that are searched: texts are smaller, weights hold no text


def is_weights(name: str) -> bool:
    """Files that decide what is loaded from a repository: weights, their index, and what makes an adapter of them."""
    return (
        name in (*ADAPTER_FILES, "adapter_config.json", "model.safetensors.index.json")
        or SHARD.fullmatch(name) is not None
    )


def stage(facts: Facts, folder: Path, repo: str, merged: Path | None = None) -> list[str]:
    """Fill `folder` with all that is published; returns the names.

    Weights are linked where the disk allows it; what a person might edit is a copy.

    Raises:
        ValueError: a file looks as if it held a secret of this environment; names the file, not the secret.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = facts.trained.checkpoint
    source = checkpoint if merged is None else merged
    wanted = (*ADAPTER_FILES, *TOKENIZER_FILES) if merged is None else MERGED_FILES
    for path in sorted(source.iterdir()):
        if path.name in wanted or (merged is not None and SHARD.fullmatch(path.name)):
            (_link if is_weights(path.name) else shutil.copyfile)(path, folder / path.name)
    if merged is None:
        settings = adapter_config(facts.trained) | {
            "base_model_name_or_path": facts.base_name,
            "revision": facts.base_commit,
        }
        _write(folder / "adapter_config.json", json.dumps(settings, indent=1) + "\n")
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
            _write(
                folder / name,
                json.dumps(
                    {k: v for k, v in fields.items() if k not in LOCAL_FIELDS},
                    indent=1,
                    ensure_ascii=False,
                )
                + "\n",
            )
    _write(folder / "README.md", card(facts, repo))
    if (picture := curves(facts)) is not None:
        _write(folder / "curves.svg", picture)
    names = sorted(path.name for path in folder.iterdir())
    check_no_secret(folder, names)
    return names


def check_no_secret(folder: Path, names: list[str]) -> None:
    """Raise ValueError for a file with the form of a token, or with the value of a variable of this environment that is called one."""
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
                f"{name} holds what looks like a secret of this environment: nothing was published; see where it comes from"
            )


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _write(path: Path, text: str) -> None:
    """Anew: a linked file must not be changed at its source."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
