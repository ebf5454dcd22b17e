"""Make text from files and models safe for a terminal."""

from __future__ import annotations

import unicodedata

BREAK = "\n"
JOINERS = "\u200c\u200d"  # parts of ordinary words, though of a category that is escaped


def printable(text: str, encoding: str = "utf-8", *, keep: str = "") -> str:
    r"""Text that a terminal shows and does not obey.

    Line breaks and other control, formatting and unassigned characters become escapes (\x1b), and
    so do characters that `encoding` does not have. Those in `keep` stay.
    """
    safe = (
        char if char in keep or _harmless(char) else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
    return "".join(safe).encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str) -> str:
    """Show line breaks as ⏎ and tabs as ⇥, as `printable`."""
    return printable(text.replace("\n", "⏎").replace("\t", "⇥"))


def refusal(error: BaseException | str, what: str = "refused") -> str:
    """Word a refusal or another end.

    The error's text may come from a file.
    """
    return f"{what}: {printable(str(error), keep=BREAK)}\n(GLASSLOOP_TRACEBACK=1 shows where)"


def _harmless(char: str) -> bool:
    category = unicodedata.category(char)
    return (category[0] != "C" and category not in ("Zl", "Zp")) or char in JOINERS
