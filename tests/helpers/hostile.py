"""Inputs that are damaged or mean harm: the list of docs/reliability.md's table."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_runs
from hostile_rows import row_cases

from glassloop.config import as_dict
from glassloop.config.arguments import from_values, parse
from glassloop.disk.publish import SUMS
from glassloop.loop.build import build_run
from glassloop.saved.capsule import read_capsule
from glassloop.saved.checkpoint import load_checkpoint

HARM = b"\x80\x04" + pickle.dumps(os.getcwd)[2:]  # a pickle that names a function


@dataclass(frozen=True)
class Place:
    """What the inputs are tried on."""

    folder: Path
    model: Path
    tokenizer: Any
    run: Any  # two updates done, a checkpoint and a capsule saved


Case = tuple[
    str, Callable[[Place], str]
]  # what is given -> what became of it, unless it is refused with a ValueError


def outcome(case: Case, place: Place) -> str:
    """What the input got, without temporary folders and libraries' words."""
    try:
        text = f"taken: {case[1](place)}"
    except ValueError as error:
        text = f"refused: {error}"
    text = re.sub(
        r"cannot be read: .*; the file is",
        "cannot be read: (what the library says); the file is",
        text,
    )
    text = re.sub(r"(malformed|does not fit): (?!.*was \d).*", r"\1: (what the library says)", text)
    text = re.sub(r"[0-9a-f]{64}", "(sum)", text.replace(os.getcwd(), "(this folder)"))
    for path in (place.run.folder, place.folder, place.model):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    text = re.sub(
        r"is not readable YAML: .*",
        "is not readable YAML: (what the library says)",
        text,
        flags=re.DOTALL,
    )
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return (
        text.replace("\n", " ")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("update_000002", "update_N")
        .strip()
    )


def saved(kind: str, change: Callable[[Path, Place], None]) -> Callable[[Place], str]:
    """A copy of the run's checkpoint or capsule, changed, and read again."""

    def gets(place: Place) -> str:
        source = next((place.run.folder / kind).glob("update_*"))
        path = place.folder / kind / source.name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        change(path, place)
        if kind == "capsules":
            return str(read_capsule(path).facts.update)
        run = place.run
        known = {
            "base_hash": run.replica.plain_engine.report.base_hash,
            "config": as_dict(run.config),
        }
        state = load_checkpoint(
            path,
            adapters=run.replica.adapters,
            optimizer=run.replica.optimizer,
            rank=0,
            world_size=1,
            **known,
        )
        return f"update {state.update}"

    return gets


def put(name: str, content: bytes) -> Callable[[Path, Place], None]:
    """Write a file of the folder anew, with a right sum."""

    def change(path: Path, _place: Place) -> None:
        import hashlib

        (path / name).write_bytes(content)
        sums = re.sub(
            rf"^\w+  {re.escape(name)}$",
            f"{hashlib.sha256(content).hexdigest()}  {name}",
            (path / SUMS).read_text(),
            flags=re.M,
        )
        (path / SUMS).write_text(sums)

    return change


def renamed_in_sums(name: str, to: str) -> Callable[[Path, Place], None]:
    def change(path: Path, _place: Place) -> None:
        (path / SUMS).write_text((path / SUMS).read_text().replace(f"  {name}\n", f"  {to}\n"))

    return change


def linked(name: str) -> Callable[[Path, Place], None]:
    def change(path: Path, place: Place) -> None:
        shutil.copy(path / name, place.folder / "outside")
        (path / name).unlink()
        (path / name).symlink_to(place.folder / "outside")

    return change


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
    """A pad token that was added, and an embedding that was not resized."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(512 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)


def adapter_with(**fields: Any) -> Callable[[Place], str]:
    """A run that starts from the checkpoint's adapter with other fields in adapter_config.json."""

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


def sections() -> Iterator[tuple[str, list[Case]]]:
    yield ("Rows", row_cases(HARM))
    yield (
        "Checkpoints and capsules",
        [
            (
                "a pickle with a right sum as adapter",
                saved("checkpoints", put("adapter_model.safetensors", HARM)),
            ),
            (
                "a pickle with a right sum as optimizer state",
                saved("checkpoints", put("optimizer.safetensors", HARM)),
            ),
            (
                "a pickle with a right sum in a capsule",
                saved("capsules", put("adapter_before.safetensors", HARM)),
            ),
            (
                "a path out of the checkpoint in its sums",
                saved("checkpoints", renamed_in_sums("rng_rank0.json", "../../config.yaml")),
            ),
            (
                "an absolute path in its sums",
                saved("checkpoints", renamed_in_sums("rng_rank0.json", "/etc/passwd")),
            ),
            (
                "a path out of a capsule in its sums",
                saved("capsules", renamed_in_sums("rng_rank0.json", "../../config.yaml")),
            ),
            ("a link in place of a checkpoint's file", saved("checkpoints", linked("state.json"))),
            ("a link in place of a capsule's file", saved("capsules", linked("capsule.json"))),
        ],
    )
    yield "A run's folder", hostile_runs.cases()
    yield (
        "Models and adapters",
        [
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
                base(
                    with_json("model.safetensors.index.json", weight_map={"w": "../../etc/passwd"})
                ),
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
        ],
    )
    yield (
        "Configs",
        [
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
        ],
    )


def table(place: Place) -> str:
    """Markdown: what was given, what it got."""
    parts = []
    for title, cases in sections():
        rows = [f"| {case[0]} | {outcome(case, place)} |" for case in cases]
        parts.append("\n".join([f"| {title}: given | what it got |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"
