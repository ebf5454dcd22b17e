"""The page of a comparison, in a browser."""

from __future__ import annotations

from pathlib import Path

from made_runs import SPIKE, write_run

from glassloop.cli.__main__ import main


def test_it_is_drawn_says_the_verdict_and_follows_a_selection(open_page, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "plain <b>1</b>".replace("/", "-"), faults=False),
        write_run(tmp_path / "hot", lr=4e-4),
        write_run(tmp_path / "hot2", lr=4e-4, seed=2),
    ]
    out = tmp_path / "compare.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    opened = open_page(out)
    assert opened.complaints == [] and opened.requests == []
    for name in ("loss", "heldout", "norm", "off-loss", "off-norm", "lr", "time"):
        assert opened.page.locator(f"#{name} .plot canvas").count() == 1, name
    verdict = opened.text("#verdicts")
    assert (
        "not resolved" in verdict
        and "one seed on side A" in verdict
        and "parts at update" in verdict
    )
    assert "optimizer.lr" in opened.text("#difference-list")
    assert opened.page.locator("main b", has_text="1").locator("visible=true").count() == 0, (
        "a name stays text"
    )
    opened.page.locator("#slider").fill(str(SPIKE))
    opened.page.keyboard.press("ArrowRight")
    assert opened.js("board.chosen") == SPIKE + 1
    assert f"update {SPIKE + 1}:" in opened.page.locator("#norm .plot").get_attribute("aria-label")
    assert opened.js("document.documentElement.scrollWidth") <= 1000
    opened.js("dispatchEvent(new Event('beforeprint'))")
    opened.js("dispatchEvent(new Event('afterprint'))")
    assert opened.complaints == []
