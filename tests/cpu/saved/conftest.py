"""A run with checkpoints, and adapters to load them into."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Bench, bench, save, state_at
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "the tokenizer's own"
    return made


@pytest.fixture(scope="module")
def trained() -> Bench:
    one = bench()
    one.update(2)
    return one


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, trained: Bench, tokenizer: Any) -> Path:
    """A run folder with the checkpoints 20 and 40; never changed, copied."""
    run = tmp_path_factory.mktemp("run")
    for update in (20, 40):
        save(run, trained, tokenizer, state_at(update))
    return run


@pytest.fixture
def run(tmp_path: Path, original: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def at_40(run: Path) -> Path:
    return run / "checkpoints/update_000040"


@pytest.fixture(scope="module")
def scratch() -> Bench:
    """A run to load into."""
    return bench(seed=3)


@pytest.fixture(scope="module")
def other() -> Bench:
    """The run that refused checkpoints are tried on: it must stay as it is."""
    one = bench(seed=5)
    one.update(1)
    return one
