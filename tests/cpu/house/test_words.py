"""No foreign turn of phrase and no repeated sentence in texts, docstrings and pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [*sorted((ROOT / "glassloop").rglob("*.py")), ROOT / "train_loop.py"]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# Instead: resumes, computes, supports, that many, if there is none.
FOREIGN = re.compile(
    r"\b(goes on|going on|carr(?:y|ies|ied) out|heed(?:s|ed)?|so many|what of|none where)\b",
    re.IGNORECASE,
)


def texts(source: str) -> Iterator[str]:
    """Every text of a Python file: messages and docstrings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def foreign(said: str) -> list[str]:
    return [found[0] for found in FOREIGN.finditer(" ".join(said.split()))]


def repeated(said: str) -> list[str]:
    """Sentences of four words or more that a docstring has twice."""
    plain = [" ".join(one.split()).rstrip(".") for one in re.split(r"(?<=[.!?])\s+|\n\n", said)]
    return [one for one in dict.fromkeys(plain) if plain.count(one) > 1 and len(one.split()) > 3]


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_speaks_plainly(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert [found for said in texts(source) for found in foreign(said)] == []
    assert [found for said in docstrings(source) for found in repeated(said)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_speaks_plainly(page: Path) -> None:
    prose = re.sub(
        r"```.*?```|<!-- made by.*?<!-- end -->", "", page.read_text("utf-8"), flags=re.S
    )
    if page.name == "design.md":  # it names them, to say so
        prose = prose.partition("## House rules")[0]
    assert foreign(prose) == []


def test_what_is_not_plain_is_seen() -> None:
    assert foreign("It is carried\nout, and goes on.") == ["carried out", "goes on"]
    assert foreign("Nobody may go onward, and what offers itself is taken.") == []
    assert repeated("A first line.\n\nAll ranks take part. All ranks take\npart.") == [
        "All ranks take part"
    ]
