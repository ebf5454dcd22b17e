"""The pattern of control tokens looks at few places of a text, and finds all that are there."""

from __future__ import annotations

import random
import re

import pytest

from glassloop.data.tokens import _pattern

SIDES = {  # token -> whether it swallows whitespace before it, and behind
    "<a>": (True, True),
    "<ab": (False, True),
    "<a": (False, False),
    "]x": (True, False),
    "^-": (False, False),
    " y": (True, False),
    r"\d": (True, False),
}
ADDED = {token: {"lstrip": left, "rstrip": right} for token, (left, right) in SIDES.items()}
PIECES = ("<", "a", ">", " ", "\n", "]", "x", "^", "-", "y", "\\", "d", "b", *SIDES)


def every_place(tokens) -> re.Pattern[str]:
    """The same tokens, tried at every place."""
    return re.compile(
        "|".join(
            r"\s*" * ADDED[t]["lstrip"] + f"({re.escape(t)})" + r"\s*" * ADDED[t]["rstrip"]
            for t in sorted(tokens, key=len, reverse=True)
        )
    )


@pytest.mark.parametrize("tokens", [tuple(SIDES), ("<a>",), ("^-", "]x"), (r"\d", " y")])
def test_it_finds_what_a_search_at_every_place_finds(tokens):
    generator = random.Random(0)
    texts = ["".join(generator.choices(PIECES, k=generator.randrange(30))) for _ in range(500)]
    expected, found = every_place(tokens), _pattern(ADDED, tokens)
    matches = 0
    for text in texts:
        wanted = [(m.span(), m.lastindex) for m in expected.finditer(text)]
        assert [(m.span(), m.lastindex) for m in found.finditer(text)] == wanted
        matches += len(wanted)
    assert matches > 100


def test_without_tokens_it_finds_nothing():
    assert _pattern(ADDED, ()).search("<a> y") is None
