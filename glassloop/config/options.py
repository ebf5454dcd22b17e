"""Options of a command.

A misspelt one is refused with the one that it means.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from glassloop.config.names import PEER_NAMES, field_names

# Of a run, beside its fields (arguments.py).
OF_A_RUN = (
    *("--config", "--hardware", "--print_config"),
    *("--resume", "--at", "--without-window", "--init_adapter"),
)
ALIKE = 0.75  # share of equal letters, as difflib counts it


class Options(argparse.ArgumentParser):
    """A parser that suggests the nearest of its own options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse a word that is nearly an option, then parse."""
        words = list(sys.argv[1:] if args is None else args)
        own = list(self._option_string_actions)
        if self.allow_abbrev:  # then a beginning of an option stands for it
            own += [option[:end] for option in own for end in range(3, len(option))]
        refuse_misspelt(words, own, self.prog)
        return super().parse_known_args(words, namespace)


def refuse_misspelt(words: Sequence[str], options: Iterable[str], command: str) -> None:
    """Raise ValueError for the first word that nearly is an option."""
    for word in words:
        if word == "--":
            return  # what follows is no option
        if near := nearest_option(word, options):
            raise ValueError(
                f"{word.partition('=')[0]} is not an option of {command}: did you mean {near}?"
            )


def nearest_option(word: str, options: Iterable[str]) -> str | None:
    """The option that a misspelt word means.

    None for an option, for a field and for what resembles nothing.
    """
    name = word.partition("=")[0].replace("_", "-")
    known = {option.replace("_", "-"): option for option in options if option[:2] == "--"}
    if name[:2] != "--" or "." in name or word.partition("=")[0] in (*known.values(), *OF_A_RUN):
        return None
    plain = name[2:].replace("-", "_")
    if plain in PEER_NAMES or plain in field_names():
        return None
    near = difflib.get_close_matches(name, known, n=1, cutoff=ALIKE)
    return known[near[0]] if near else None
