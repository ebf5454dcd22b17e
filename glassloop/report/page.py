"""Build one HTML file that loads nothing.

Styles, scripts and data stand in it, and its policy lets nothing else run.

Curves are drawn by uPlot 1.6.32 (MIT, github.com/leeoniya/uPlot; assets/uplot.LICENSE), taken from
its npm package unchanged. It was chosen for size (50 KB; Plotly has 4.8 MB, ECharts 1.1 MB, Vega
with Vega-Lite 0.8 MB), for speed (canvas: 5,000 updates of dozens of curves in tens of
milliseconds), because it needs neither eval nor a worker, so that a strict policy holds, and
because it has no dependency. It gives nothing to a screen reader: legends with values, keys and
labels are ours, in HTML beside each figure.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot.css", "page.css")
SHARED = ("uplot.js", "data.js", "charts.js")
SCRIPTS = {
    "run": (*SHARED, "heat.js", "figures.js", "detail.js", "tables.js", "page.js"),
    "compare": (*SHARED, "compare.js"),
}
# stands in a body for picker.html; a run's page has one of its own, with buttons for marks
PICKER = "<!-- picker -->\n"
BODIES = {"run": "page.html", "compare": "compare.html"}


def page(data: dict[str, Any]) -> str:
    """The whole file. data["kind"]: "run" | "compare"."""
    scripts = [ASSETS / name for name in SCRIPTS[data["kind"]]]
    return whole_page(data, ASSETS / BODIES[data["kind"]], scripts)


def whole_page(data: dict[str, Any], body: Path, scripts: Sequence[Path]) -> str:
    """Build an HTML file of these parts and STYLES.

    `data`, with its "title", stands in it as JSON. The policy lets only these scripts run.
    """
    texts = [path.read_text(encoding="utf-8") for path in scripts]
    styles = [(ASSETS / name).read_text(encoding="utf-8") for name in STYLES]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, texts))}",
            f"style-src {' '.join(map(_hash, styles))}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{html.escape(data['title'])} · glassloop</title>",
        *(f"<style>{style}</style>" for style in styles),
    ]
    inner = [
        body.read_text(encoding="utf-8").replace(
            PICKER, (ASSETS / "picker.html").read_text(encoding="utf-8")
        ),
        f'<script type="application/json" id="data">{as_data(data)}</script>',
        *(f"<script>{text}</script>" for text in texts),
    ]
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        *head,
        "</head>",
        "<body>",
        *inner,
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def as_data(value: Any) -> str:
    """Write JSON that no HTML parser takes for markup.

    < > & are escapes in its strings. Numbers that are not finite must be strings already.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":  # none of them stands outside of a string in JSON
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # A lone surrogate becomes the JSON escape that it came from.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _hash(text: str) -> str:
    """A source of the policy: exactly this inline text may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
