"""Files beside merged weights: config, generation config, tokenizer, chat template.

The generation config has every stop token; the chat template is training's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.base.source import BaseSource
from glassloop.use.trained import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glassloop.data.templates import Template

# Files of a checkpoint that are no tokenizer's.
OWN = ("adapter_", "optimizer.", "rng_rank", "state.json", "SHA256SUMS", "README")


def read_json(path: Path) -> dict[str, Any]:
    """Fields of a JSON file. Raises ValueError naming it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch the base again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no fields: fetch the base again")
    return found


def original_folder(source: BaseSource) -> Path:
    """Find or download the base's own 16-bit files.

    Raises:
        ValueError: there are none; names model.id.
    """
    if source.drawn is not None:
        raise ValueError(
            f"model.id = random:{source.drawn} has drawn weights and no original: --base "
            "dequantised merges into them"
        )
    if source.folder is not None:
        return source.folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        return Path(snapshot_download(source.name, revision=source.commit, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # whatever the HTTP library of the day raises when the hub is out of reach
        raise ValueError(
            f"model.id = {source.name}: its original weights are not on this machine and cannot be "
            f"fetched ({error}): connect, name a "
            "folder with --model, or merge with --base dequantised"
        ) from error


def tokenizer_files(trained: Trained) -> list[str]:
    return [name for name in trained.files if not name.startswith(OWN)]


def write_rest(
    out: Path,
    trained: Trained,
    base: Path,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
) -> None:
    """Write everything but weights.

    `base`: the folder of the model's config.json, generation_config.json and code.
    """
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    _write(out / "config.json", config)
    path = base / "generation_config.json"
    _write(
        out / "generation_config.json",
        generation_config(read_json(path) if path.is_file() else {}, config, template, tokenizer),
    )
    for code in base.glob("*.py"):
        shutil.copy(code, out / code.name)
    for name in tokenizer_files(trained):
        shutil.copy(trained.checkpoint / name, out / name)
    settings = read_json(out / "tokenizer_config.json")
    # Converters to other formats believe it, also where the tokenizer does otherwise.
    settings["add_bos_token"] = adds_bos(tokenizer)
    _write(out / "tokenizer_config.json", settings)


def generation_config(
    own: dict[str, Any],
    config: dict[str, Any],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Build the base's generation config with every token that ends an answer.

    Those of training's template are among them.
    """
    stops = own.get("eos_token_id", config.get("eos_token_id"))
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    stops = list(dict.fromkeys((*template.stop_ids, *stops)))
    found = {
        name: value
        for name, value in own.items()
        if name not in ("_from_model_config", "transformers_version")
    }
    found |= {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    found.setdefault("pad_token_id", tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        found.setdefault("bos_token_id", tokenizer.bos_token_id)
    return found


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell if the tokenizer puts BOS before a plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]  # type: ignore[index]


def check_out(out: Path) -> None:
    """Raise ValueError where the output's folder is taken or cannot be made."""
    parent = out.absolute().parent
    if out.exists():
        raise ValueError(f"OUT = {out} exists: name a folder that does not")
    if not parent.is_dir():
        raise ValueError(f"OUT = {out}: there is no folder {parent}: make it first")
    try:
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"OUT = {out}: nothing can be written into {parent} ({error.strerror}): name another "
            "place"
        ) from error


def check_room(out: Path, needed: int, *, with_table: bool) -> None:
    """Raise ValueError if the disk lacks space for the merge.

    The table compares it with a second merge.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed * (2 if with_table else 1):
        short = f"OUT = {out}: {needed / 2**30:.1f} GiB are needed"
        second = ", and as much again for the table (--no-table: not)" if with_table else ""
        raise ValueError(
            f"{short}{second}; its disk has {free / 2**30:.1f} GiB free: free some, or name "
            "another disk"
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
