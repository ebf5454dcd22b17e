"""The page of a study, in a browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import study_stand_in

from glassloop.cli.__main__ import main
from glassloop.study import running

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
def test_it_shows_claims_numbers_and_curves_and_asks_no_network(
    open_page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cpu")]))
    monkeypatch.setattr(running, "command", running.command)
    study_stand_in.install()
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    text = study_stand_in.FILE.replace("lora.r: [4, 8]", "lora.r: [4, 8, 13, 66]")
    file.write_text(text.replace("says: a higher rank", "says: <b>bold</b> higher rank"))
    assert main(["study", str(file), "--out", str(out), "--parallel", "3"]) == 1
    opened = open_page(out / "study.html")
    assert opened.complaints == [] and opened.requests == []
    for name in ("heldout", "loss", "norm", "noise", "lr"):
        assert opened.page.locator(f"#{name} .plot canvas").count() == 1, name
    claims = opened.text("#claim-list")
    assert (
        "supported" in claims
        and "<b>bold</b> higher rank ends lower" in claims
        and "95 % interval" in claims
    )
    assert opened.page.locator("#claim-list svg").count() == 1
    cells = opened.text("#cell-list")
    assert (
        "held-out loss after the last update" in cells
        and "r13-seed1" in cells
        and "no result" in cells.lower()
    )
    assert "--update 24 --bisect" in opened.text("#diverged-list")
    opened.page.locator("#slider").fill("3")
    opened.page.keyboard.press("ArrowRight")
    assert opened.js("board.chosen") is not None
    assert "training loss" in opened.text("#chosen")
    assert opened.js("document.documentElement.scrollWidth") <= 1000
    opened.page.locator("#theme").click()
    opened.js("dispatchEvent(new Event('beforeprint'))")
    opened.js("dispatchEvent(new Event('afterprint'))")
    assert opened.complaints == []


def test_a_study_of_which_nothing_ran_has_a_page_too(
    open_page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cpu")]))
    monkeypatch.setattr(running, "command", running.command)
    study_stand_in.install()
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(
        study_stand_in.FILE.replace("lora.r: [4, 8]", "lora.r: [13, 14]")
        .replace("r: 8", "r: 13")
        .replace("r: 4}", "r: 14}")
    )
    assert main(["study", str(file), "--out", str(out), "--only", "r13-seed1"]) == 1
    opened = open_page(out / "study.html")
    assert opened.complaints == [] and "not resolved" in opened.text("#claim-list")
