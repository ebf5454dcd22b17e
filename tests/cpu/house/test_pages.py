"""README and docs: links lead somewhere, commands exist, sentences stay short."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from glassloop.cli.__main__ import command_names

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# One two\n[a](#one-two) [b](#three) [c](none.md) [d](https://x.y)\n")
    assert broken_links(page) == ["#three", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    named = set(re.findall(r"(?m)(?:^|`)glassloop ([a-z-]+)", page.read_text(encoding="utf-8")))
    assert named <= set(command_names())


def test_readme_serves_in_one_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text[: text.index("\n## ")]
    assert len(first.splitlines()) <= 32
    assert "glassloop train" in first
    assert first.count("![") == 1
    claims = re.findall(r"^- \*\*(?:.|\n)*?(?=^- |\n\n)", first, re.MULTILINE)
    assert len(claims) == 3
    assert all(LINK.search(claim) and re.search(r"\d|eight", claim) for claim in claims)


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md", "docs/engines.md"])
def test_sentences_are_short(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = " ".join(
        line for line in text.splitlines() if line and not line.startswith(("|", "#", "!"))
    )
    sentences = re.split(r"(?<=[.:;])\s+", prose)
    assert statistics.median(len(one.split()) for one in sentences) <= 12
