"""Answers that a toy engine generates."""

from __future__ import annotations

from typing import Any

from evaluation_toys import (
    ToyEngine,
    ToyTemplate,
    toy_examples,
    toy_setup,
)

from glassloop.loop.generation import generate


def generated(engine: ToyEngine, prompts: list[list[int]], **changes: Any) -> list[tuple[int, ...]]:
    setup = toy_setup(**{"batch_size": 4, "max_new_tokens": 10, **changes})
    return generate(engine.hf, prompts, setup)


def prompts_of(count: int) -> list[list[int]]:
    return [ToyTemplate().prompt_ids(example) for example in toy_examples(count)]
