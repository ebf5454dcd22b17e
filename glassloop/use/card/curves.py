"""Loss and gradient norm of a run as one SVG picture.

No package draws it.

It is readable on light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 860, 300, 62, 34, 78
Point = tuple[float, float]


def svg(panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[Point]]]]]) -> str:
    """Draw panels side by side: (title, [(name of a line, points)]).

    Points that are not finite are left out.
    """
    wide = (WIDTH - LEFT - 16 - GAP * (len(panels) - 1)) / len(panels)
    body = "".join(
        _panel(title, lines, LEFT + i * (wide + GAP), wide)
        for i, (title, lines) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{body}</svg>\n'
    )


def _panel(
    title: str, lines: Sequence[tuple[str, Sequence[Point]]], left: float, wide: float
) -> str:
    lines = [(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in lines]
    every = [p for _, points in lines for p in points]
    high = HEIGHT - TOP - 40
    out = f'<text x="{left}" y="20" font-weight="bold">{escape(title)}</text>'
    if not every:
        return out + f'<text x="{left}" y="{TOP + 20}">no finite value on record</text>'
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*every, strict=True))
    pad = 0.05 * (y1 - y0) or 0.5
    y0, y1, x1 = y0 - pad, y1 + pad, x1 if x1 > x0 else x0 + 1

    def at(p: Point) -> Point:
        return left + wide * (p[0] - x0) / (x1 - x0), TOP + high * (y1 - p[1]) / (y1 - y0)

    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        y = at((x0, value))[1]
        out += (
            f'<line x1="{left:.1f}" x2="{left + wide:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#dddddd"/>'
        )
        out += _label(left - 6, y + 4, "end", f"{value:.3g}")
    for value, anchor in ((x0, "start"), (x1, "end")):
        out += _label(at((value, y0))[0], HEIGHT - 22, anchor, f"{value:g}")
    out += _label(left + wide / 2, HEIGHT - 22, "middle", "update")
    for i, (name, points) in enumerate(lines):
        colour = ("#1f5fbf", "#c2410c")[i % 2]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
        out += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        if i or len(points) < 30:
            out += "".join(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>'
                for x, y in map(at, points)
            )
        out += (
            f'<text x="{left + i * 110:.1f}" y="{HEIGHT - 6}" fill="{colour}">{escape(name)}</text>'
        )
    return out


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444444">{text}</text>'
