"""A key that stands for all that decides a run's tokenised rows."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from glassloop.config import DataConfig
from glassloop.data.sources import Files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READERS = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")  # their versions count


def key_of(data: DataConfig, seed: int, files: Files, tokenizer: PreTrainedTokenizerBase) -> str:
    """64 hex digits over all that decides tokenised rows.

    Data, seed, files' bytes, tokenizer, template and the code that reads them.

    Raises OSError for a file that cannot be read.
    """
    digest = hashlib.sha256(f"{_code()} {seed} {data.model_dump_json()}".encode())
    for place, found in files.items():
        named = (place, found.names, found.split, found.label, found.part, found.notes)
        digest.update(json.dumps(named).encode())
        for path in found.paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(_tokenizer(tokenizer))
    return digest.hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = (
        type(tokenizer).__name__,
        tokenizer.name_or_path,
        str(tokenizer.special_tokens_map),
        tokenizer.chat_template,
        "" if backend is None else cast(str, backend.to_str()),
    )
    return hashlib.sha256(json.dumps(said).encode()).digest()


@cache
def _code() -> str:
    """This package's files and the versions of what they read with."""
    digest = hashlib.sha256(str(sys.version_info[:2]).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for package in READERS:
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()
