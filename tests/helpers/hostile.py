"""Inputs that are damaged or mean harm, and what each gets: docs/reliability.md has this list."""

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

from glassloop.config.arguments import from_values, parse
from glassloop.config.config import DataConfig, as_dict
from glassloop.data.dataset import build_rows, summary
from glassloop.data.sources import load_examples
from glassloop.data.templates import make_template
from glassloop.disk.publish import SUMS
from glassloop.loop.build import build_run
from glassloop.saved.capsule import read_capsule
from glassloop.saved.checkpoint import load_checkpoint

GOOD = b'{"prompt": "who calls?", "completion": "nobody"}\n'
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
    """What the input got, without the names of temporary folders and without what libraries say."""
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
    return (
        text.replace("\n", " ")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("update_000002", "update_N")
        .strip()
    )


def data(name: str, content: bytes, **fields: Any) -> Callable[[Place], str]:
    """The rows of a file, and the line that the run's header has on them."""

    def gets(place: Place) -> str:
        path = place.folder / name
        path.write_bytes(content)
        settings = DataConfig(source=str(path), template="chat", **{"max_tokens": 64, **fields})
        loaded = load_examples(settings, 0)
        rows = build_rows(loaded, make_template(settings, place.tokenizer, loaded.train), settings)
        controls = {place.tokenizer.eos_token_id, place.tokenizer.bos_token_id}
        count = sum(token in controls for row in rows.train.rows for token in row.input_ids) / len(
            rows.train.rows
        )
        said = [
            re.sub(r"^training *", "", line.strip())
            for line in summary(rows, settings)
            if "rows kept" in line
        ]
        skipped = "".join(
            f", {count} skipped ({reason})" for reason, count in loaded.skipped.items()
        )
        return f"{said[0]}{skipped}; {count:g} begin and end tokens a row"

    return gets


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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
    """A run that starts from an adapter of these files; those not named are the checkpoint's."""

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
    marks = "</s><|assistant|>yes<s>"
    huge = lines(
        {"prompt": "yes?", "completion": "word " * 200_000}, {"prompt": "a", "completion": "b"}
    )
    yield (
        "Rows",
        [
            ("an empty csv file", data("a.csv", b"")),
            ("a csv file with a header alone", data("a.csv", b"prompt,completion\n")),
            ("an empty jsonl file", data("a.jsonl", b"\n \n")),
            ("a json file with an empty list", data("a.json", b"[]")),
            ("an empty parquet file", data("a.parquet", b"")),
            ("a parquet file of other bytes", data("a.parquet", b"PAR1 junk PAR1")),
            ("a pickle called parquet", data("a.parquet", HARM)),
            ("a csv row with a cell too many", data("a.csv", b"prompt,completion\nx,y,z\n")),
            ("a csv cell whose quote never ends", data("a.csv", b'prompt,completion\n"x,y\n')),
            ("two csv columns of one name", data("a.csv", b"prompt,prompt\nx,y\n")),
            ("a json file cut short", data("a.json", b'[{"prompt": ')),
            ("a jsonl line cut short", data("a.jsonl", GOOD + b'{"prompt": \n')),
            ("a jsonl line that is a number", data("a.jsonl", b"5\n")),
            ("a jsonl line of 100,000 brackets", data("a.jsonl", b"[" * 100_000 + b"\n")),
            ("a json file of 100,000 brackets", data("a.json", b"[" * 100_000)),
            ("a json list that holds null", data("a.json", b"[null, " + GOOD + b"]")),
            ("columns that fit no format", data("a.jsonl", lines({"who": "a", "what": "b"}))),
            (
                "a number where text is wanted",
                data("a.jsonl", lines({"prompt": 5, "completion": "x"})),
            ),
            ("a NUL byte in csv", data("a.csv", b"prompt,completion\nx\0,y\n")),
            (
                "a NUL character in a json string",
                data("a.jsonl", lines({"prompt": "x\0", "completion": "y"})),
            ),
            ("broken UTF-8", data("a.jsonl", b'{"prompt": "\xc3", "completion": "y"}\n')),
            ("UTF-16", data("a.csv", "prompt,completion\nx,y".encode("utf-16"))),
            (
                "half of a surrogate pair",
                data("a.jsonl", b'{"prompt": "\\ud800", "completion": "y"}\n'),
            ),
            (
                "an empty answer among others",
                data("a.jsonl", lines({"prompt": "a", "completion": " "}) + GOOD),
            ),
            ("a row of a million characters, too_long = drop", data("a.jsonl", huge)),
            (
                "a row of a million characters, too_long = cut",
                data("a.jsonl", huge, too_long="cut"),
            ),
            (
                "control tokens as text in question and answer",
                data("a.jsonl", lines({"prompt": marks, "completion": marks})),
            ),
            (
                "the same row without them",
                data("a.jsonl", lines({"prompt": "yes", "completion": "yes"})),
            ),
            (
                "a file that is not there",
                lambda place: str(
                    load_examples(DataConfig(source=str(place.folder / "none.csv")), 0)
                ),
            ),
        ],
    )
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
