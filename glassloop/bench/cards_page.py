"""A page of all cards, measured beside predicted.

It loads nothing and runs no script.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.bench.card import NAME, card_key, comparable, predicted

WIDTH = 420  # pixels of the longest bar
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .25rem .5rem; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { height: .8rem } .measured { background: #2a6fb0 } .predicted { background: #c9d6e2 }
"""


@dataclass(frozen=True)
class CardRow:
    """One card.

    Attributes:
        predicted, measured: real tokens/s per GPU; measured is the best line's, None without one.
        joules: of a token, of that line; None if its card does not say.
        lines: comparable lines of the card.
    """

    card: str
    predicted: float
    measured: float | None
    joules: float | None
    lines: int


def card_rows(lines: Sequence[dict[str, Any]]) -> list[CardRow]:
    """Rows of every card that is predicted, measured ones first."""
    found = []
    for key, fast in predicted().items():
        own = [line for line in lines if comparable(line) and card_key(line) == key]
        best = max(own, key=lambda line: line["tokens_per_s_per_rank"]["real"], default=None)
        frugal = None if best is None else (best.get("energy") or {}).get("tokens_per_joule")
        found.append(
            CardRow(
                card=key,
                predicted=fast,
                measured=None if best is None else best["tokens_per_s_per_rank"]["real"],
                joules=1 / frugal if frugal else None,
                lines=len(own),
            )
        )
    return sorted(found, key=lambda row: (row.measured is None, row.card))


def cards_page(lines: Sequence[dict[str, Any]]) -> str:
    """The page as HTML. Numbers that nobody measured are labelled."""
    rows = card_rows(lines)
    longest = max(max(row.predicted, row.measured or 0.0) for row in rows)
    shown = "\n".join(_row(row, longest) for row in rows)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{NAME} by card</title>\n"
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<style>{STYLE}</style></head><body>\n<h1>{NAME}: real tokens/s per GPU</h1>\n"
        "<p>Dark bars were measured by <code>glassloop bench --card</code>, light ones are "
        "arithmetic.</p>\n<table><tr><th>card</th><th></th><th>measured</th><th>predicted</th>"
        f"<th>J/token</th><th>lines</th></tr>\n{shown}\n</table>\n</body></html>\n"
    )


def _row(row: CardRow, longest: float) -> str:
    drawn = [("predicted", row.predicted)]
    if row.measured is not None:
        drawn.insert(0, ("measured", row.measured))
    bars = "".join(
        f'<div class="bar {kind}" style="width:{round(value / longest * WIDTH)}px"></div>'
        for kind, value in drawn
    )
    numbers = (
        "not measured" if row.measured is None else f"{row.measured:,.0f}",
        f"{row.predicted:,.0f}",
        "-" if row.joules is None else f"{row.joules:.3f}",
        str(row.lines),
    )
    cells = "".join(f'<td class="number">{one}</td>' for one in numbers)
    return f"<tr><td>{html.escape(row.card)}</td><td>{bars}</td>{cells}</tr>"
