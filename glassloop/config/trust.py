"""Settings that a file cannot switch on, only today's command line.

A run's folder, a checkpoint, a capsule, a YAML file or a study may come from a stranger. What such
a file asks for is read as data: it names models and rows, which are read and never executed. Three
settings reach further, and each needs a word of the person at the keyboard:

    model.trust_remote_code   runs Python that comes with a model or tokenizer
    model.cache_dir           makes a folder and writes models into it, anywhere on the disk
    tracking.webhook          sends the run's alarms and end to an address
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from glassloop.config.config import Config

TRUST = "model.trust_remote_code"
CACHE = "model.cache_dir"
WEBHOOK = "tracking.webhook"
MARKS = ("CACHEDIR.TAG", "file_hashes.json", "quantized")  # a cache of glassloop holds one


class Words(NamedTuple):
    """A command's words for the settings of a model."""

    trust: str
    distrust: str
    cache: str


FIELDS = Words(f"{TRUST}=true", f"{TRUST}=false", f"{CACHE}=")
OPTIONS = Words("--trust-remote-code", "--no-trust-remote-code", "--cache-dir=")


def unasked(config: Config, given: Collection[str], source: str, words: Words) -> str | None:
    """Explain the first setting that `source` may not switch on, or None.

    Args:
        given: dotted names of the fields that the command line gives.
        source: the file that `config` was read from, for the message.
    """
    model = config.model
    if model.trust_remote_code and TRUST not in given:
        return (
            f"{TRUST} = true stands in {source}: it runs Python code that comes with the model, "
            f"and a file cannot ask for that. If you trust the code of model.id = {model.id}, add "
            f"{words.trust}; to run none of it, add {words.distrust}"
        )
    if config.tracking.webhook is not None and WEBHOOK not in given:
        return (
            f"{WEBHOOK} stands in {source}: a file cannot have messages sent to an address. Give "
            f"it on the command line, {WEBHOOK}=env:NAME or {WEBHOOK}=https://..., or send none "
            f"with {WEBHOOK}=null"
        )
    if model.cache_dir is None or CACHE in given or is_cache(model.cache_dir):
        return None
    return (
        f"{CACHE} = {model.cache_dir} stands in {source} and is no cache of glassloop: a file "
        f"cannot have a folder made there. Add {words.cache}{model.cache_dir} to make it, or name "
        "another"
    )


def is_cache(folder: str) -> bool:
    return any((Path(folder).expanduser() / mark).exists() for mark in MARKS)
