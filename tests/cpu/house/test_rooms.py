"""Page and docstrings agree with the table of imports, and no modules import in a circle."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IMPORTS = runpy.run_path(str(Path(__file__).with_name("test_imports.py")))
TABLE = IMPORTS["TABLE"]
RULES = {row: set(rule.siblings.split()) for row, rule in TABLE.items() if row != "__init__"}
ROWS = list(RULES)


def pages_rows() -> list[tuple[str, str]]:
    """(row, what it may import) of docs/design.md, a row for each package."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = text.partition("| package | holds | may import |")[2].partition("\n\n")[0]
    found = []
    for line in table.strip().splitlines()[1:]:
        names, _, may = (cell.strip() for cell in line.strip("|").split(" | "))
        found += [(name, may) for name in re.findall(r"`(\w+)(?:/|\.py)`", names)]
    return found


def meant(said: str, row: str) -> tuple[set[str], bool]:
    """The rooms that a phrase allows, and whether it names each of them."""
    text = said.strip().rstrip(".").replace("`", "")
    if text == "nothing of ours":
        return set(), True
    if text == "everything; nobody imports it":
        return {"*"}, True
    if text.startswith("all above"):
        return set(ROWS[: ROWS.index(row)]) - {text.removeprefix("all above but ")}, False
    names = re.split(r", | and ", text.removesuffix(" and above"))
    assert set(names) <= set(ROWS), f"{row}: {said!r} names no such room"
    if text.endswith(" and above"):
        return set(ROWS[: 1 + max(map(ROWS.index, names))]), False
    return set(names), True


def off(row: str, said: str) -> str:
    """How a phrase and the table differ; nothing if they agree."""
    allowed, each = meant(said, row)
    agree = allowed == RULES[row] if each else RULES[row] <= allowed
    return "" if agree else f"{row}: {said!r}, but the table has {sorted(RULES[row])}"


def test_the_page_has_the_tables_rows_in_its_order() -> None:
    assert [row for row, _ in pages_rows()] == ROWS


@pytest.mark.parametrize(("row", "said"), pages_rows())
def test_the_page_allows_what_the_table_allows(row: str, said: str) -> None:
    assert off(row, said) == ""


@pytest.mark.parametrize("row", [row for row in ROWS if (ROOT / "glassloop" / row).is_dir()])
def test_a_rooms_docstring_allows_what_the_table_allows(row: str) -> None:
    text = (ROOT / "glassloop" / row / "__init__.py").read_text(encoding="utf-8")
    said = re.findall(r"May import ([^.]*)\.", ast.get_docstring(ast.parse(text)) or "")
    assert len(said) == 1, f"{row}/__init__.py says {len(said)} times what it may import"
    assert off(row, said[0].replace("\n", " ")) == ""


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("plan", "config"),
        ("plan", "config, predict, stats"),
        ("disk", "config"),
        ("record", "nothing of ours"),
        ("loop", "all above but engines"),
    ],
)
def test_a_planted_difference_is_seen(row: str, said: str) -> None:
    assert off(row, said).startswith(f"{row}: ")


def test_a_wider_range_is_no_difference() -> None:
    assert off("doctor", "health and above") == ""


def arrows() -> dict[str, set[str]]:
    """Module -> modules of glassloop that it imports, late and for types too."""
    sources = {IMPORTS["module_of"](path): path for path in IMPORTS["sources"]()}
    known, found = {name.removesuffix(".__init__"): name for name in sources}, {}
    for module, path in sources.items():
        named = {item.name for item in IMPORTS["imports"](module, path.read_text(encoding="utf-8"))}
        named |= {name.rpartition(".")[0] for name in named if name not in known}
        found[module.removesuffix(".__init__")] = (named & known.keys()) - {"glassloop"}
    return found


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves by way of others: those that no order can place."""
    left = {module: set(targets) - {module} for module, targets in arrows.items()}
    while left:
        imported = set().union(*left.values())
        inside = {one for one, targets in left.items() if targets & left.keys() and one in imported}
        if inside == left.keys():
            break
        left = {one: left[one] & inside for one in inside}
    return set(left)


def test_no_modules_import_in_a_circle() -> None:
    found = arrows()
    assert len(found) > 300 and "glassloop.loop.run" in found["glassloop.loop.memory"]
    assert circles(found) == set()


def test_a_circle_is_seen() -> None:
    planted = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(planted) == {"a", "b", "c"}
    found = arrows()
    found["glassloop.loop.run"].add("glassloop.loop.memory")
    assert {"glassloop.loop.run", "glassloop.loop.memory"} <= circles(found)
