"""Tokenizers of toys, and their codecs made once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from toys import (
    BOS,
    EOS,
    MARKS,
    toy,
)
from transformers import PreTrainedTokenizerFast

from glassloop.data import templates
from glassloop.data.tokens import make_codec


@pytest.fixture(scope="module")
def one_codec_a_tokenizer() -> Iterator[None]:
    """Make a tokenizer's codec once, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "make_codec", functools.cache(make_codec))
        yield


@pytest.fixture(scope="module")
def r1_toy() -> PreTrainedTokenizerFast:
    return toy(MARKS, bos=BOS, eos=EOS)
