"""Strings of a run's files as Markdown that only shows them.

A name, a version or a licence may come from a stranger's folder. Here it cannot become a heading,
a link, HTML, code that a reader would copy, or the end of a table's cell.
"""

from __future__ import annotations

import re
from typing import Any

LONGEST = 200  # characters of one string
PLAIN = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9 .,;:'()/+=%-]|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9]))*", re.ASCII
)
ADDRESS = re.compile(r"//|www\.", re.IGNORECASE)  # GitHub's Markdown makes links of these


def words(value: Any) -> str:
    """Return one line of Markdown that shows `value` literally.

    Plain words stay as they are. Anything else stands in a code span, where Markdown and HTML have
    no effect; a backtick, a bar and what is not printable become escapes such as \\u0060.
    """
    text = str(value)
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    line = "".join(
        char if char.isprintable() and char not in "`|" else f"\\u{ord(char):04x}" for char in text
    )
    if PLAIN.fullmatch(line) and not ADDRESS.search(line):
        return line
    return f"`{line}`" if line.strip() else "(empty)"
