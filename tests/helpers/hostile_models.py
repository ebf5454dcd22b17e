"""Hostile models, adapters and configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_place import HARM, Case, Place

from glassloop.config import as_dict
from glassloop.config.arguments import from_values, parse
from glassloop.loop.build import build_run


def base(change: Callable[[Path], None]) -> Callable[[Place], str]:
    """A run on a changed copy of the model."""

    def gets(place: Place) -> str:
        path = place.folder / "base"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(place.model, path)
        change(path)
        values = {
            **as_dict(place.run.config),
            "run": {"dir": str(place.folder), "name": "base-run"},
        }
        values["model"] = {**values["model"], "id": str(path)}
        build_run(from_values(values)).close()
        return "it runs"

    return gets


def with_json(name: str, **fields: Any) -> Callable[[Path], None]:
    """A base whose JSON file says something else."""

    def change(path: Path) -> None:
        file = path / name
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **fields}))

    return change


def template(text: str) -> Callable[[Path], None]:
    """A base whose tokenizer has this chat template."""
    return lambda path: (path / "chat_template.jinja").write_text(text) and None


def own_code(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    named = {"AutoConfig": "harm.Harm", "AutoModelForCausalLM": "harm.Harm"}
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "harm", "auto_map": named})
    )
    (path / "harm.py").write_text("raise SystemExit('this ran')\n")


def pickled_base(path: Path) -> None:
    for weights in path.glob("*.safetensors"):
        weights.unlink()
    (path / "pytorch_model.bin").write_bytes(HARM)


def pointer(name: str) -> Callable[[Path], None]:
    """A file as a clone without Git LFS has it."""
    content = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    return lambda path: (path / name).write_text(content) and None


def pad_beyond(path: Path) -> None:
    """Add a pad token without resizing the embedding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(512 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)


def adapter_with(**fields: Any) -> Callable[[Place], str]:
    """A run that starts from a changed adapter_config.json.

    The adapter is that of the checkpoint.
    """

    def gets(place: Place) -> str:
        source = next((place.run.folder / "checkpoints").glob("update_*"))
        known = json.loads((source / "adapter_config.json").read_text())
        return adapter({"adapter_config.json": json.dumps(known | fields).encode()})(place)

    return gets


def adapter(files: dict[str, bytes]) -> Callable[[Place], str]:
    """A run from an adapter of these and the checkpoint's files."""

    def gets(place: Place) -> str:
        path = place.folder / "adapter"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        source = next((place.run.folder / "checkpoints").glob("update_*"))
        for name, content in {
            "adapter_config.json": (source / "adapter_config.json").read_bytes(),
            **files,
        }.items():
            (path / name).write_bytes(content)
        values = {
            **as_dict(place.run.config),
            "run": {"dir": str(place.folder), "name": "adapter-run"},
        }
        values["model"] = {**values["model"], "init_adapter": str(path)}
        build_run(from_values(values)).close()
        return "it runs"

    return gets


def config(content: bytes) -> Callable[[Place], str]:
    def gets(place: Place) -> str:
        path = place.folder / "a.yaml"
        path.write_bytes(content)
        return f"optimizer.lr = {parse(['--config', str(path)]).optimizer.lr}"

    return gets


def words(*given: str) -> Callable[[Place], str]:
    return lambda place: f"optimizer.lr = {parse(list(given)).optimizer.lr}"


def model_cases() -> list[Case]:
    return [
        ("a model that brings its own Python code", base(own_code)),
        ("a model whose weights are a harmful pickle", base(pickled_base)),
        ("weights that are a Git LFS pointer", base(pointer("model.safetensors"))),
        ("a tokenizer.json that is a Git LFS pointer", base(pointer("tokenizer.json"))),
        ("a config.json that is a Git LFS pointer", base(pointer("config.json"))),
        ("a pad token beyond the embedding", base(pad_beyond)),
        ("a million layers", base(with_json("config.json", num_hidden_layers=10**6))),
        ("no attention head", base(with_json("config.json", num_attention_heads=0))),
        ("text as a size", base(with_json("config.json", hidden_size="64"))),
        (
            "a kind of model with terminal escapes",
            base(with_json("config.json", model_type="\x1b]0;evil\x07")),
        ),
        (
            "an index that names a file elsewhere",
            base(with_json("model.safetensors.index.json", weight_map={"w": "../../etc/passwd"})),
        ),
        (
            "a chat template that fills the memory",
            base(template("{{ 'x' * 90000000000 }}")),
        ),
        (
            "a chat template that calls itself",
            base(template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")),
        ),
        ("a chat template that includes a file", base(template("{% include '/etc/passwd' %}"))),
        (
            "a chat template whose message has terminal escapes",
            base(template("{{ raise_exception('\x1b]0;evil\x07') }}")),
        ),
        ("an adapter as a pickle (adapter_model.bin)", adapter({"adapter_model.bin": HARM})),
        (
            "a pickle called adapter_model.safetensors",
            adapter({"adapter_model.safetensors": HARM}),
        ),
        ("an adapter whose target_modules is a number", adapter_with(target_modules=5)),
        ("an adapter of a variant that glassloop does not know", adapter_with(use_new=[1])),
        (
            "an adapter whose initialisation changed its base",
            adapter_with(init_lora_weights="pissa"),
        ),
        ("an adapter_config.json that is a list", adapter({"adapter_config.json": b"[]"})),
        (
            "an adapter_config.json in broken UTF-8",
            adapter({"adapter_config.json": b'{"r": "\xc3"}'}),
        ),
    ]


def config_cases() -> list[Case]:
    return [
        (
            "a YAML file that makes a Python object",
            config(b"optimizer: !!python/object/apply:os.getcwd []\n"),
        ),
        (
            "a YAML file that lets a model run code",
            config(b"model:\n  trust_remote_code: true\n"),
        ),
        ("a YAML file in broken UTF-8", config(b"optimizer:\n  lr: \xc3\n")),
        ("a YAML file that is a list", config(b"- 1\n")),
        ("a section that is a number", config(b"optimizer: 5\n")),
        ("a field that nobody knows", words("optimizer.lrr=1")),
        ("more brackets than can be nested", config(b"[" * 5_000)),
        ("infinity as learning rate", words("optimizer.lr=inf")),
        ("not a number as learning rate", words("optimizer.lr=nan")),
        ("text as learning rate", words("optimizer.lr=fast")),
        ("a run name that leaves its folder", words("run.name=../../x")),
    ]
