"""The base's tokenizer, loaded without its weights or an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glassloop.base.source import BaseSource, check_config, loading_errors, resolve_source
from glassloop.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelConfig, source: BaseSource | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model.id`, at the same commit as its weights.

    A tokenizer that names no pad token pads with EOS. Masks go by length, so the two never mix.

    Args:
        source: of the base, where the caller has resolved it.

    Raises:
        ValueError: there is no tokenizer, or it has no EOS; names model.id.
    """
    from transformers import AutoTokenizer

    if source is None:
        source = resolve_source(model)
        check_config(source, model)
    with loading_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.id = {model.id}: the tokenizer has no EOS token, so the model cannot learn to "
            "stop. Choose another model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
