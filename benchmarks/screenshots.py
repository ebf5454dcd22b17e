"""Pictures of a run's page for the README.

`python benchmarks/screenshots.py RUN` with Chromium and playwright installed.

Writes docs/images/report-*.png from the page of RUN (the demo: `make demo`), at 1,000 pixels of
width.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from glassloop.report.writing import write_report

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
MOST_BYTES = 300_000


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = write_report(Path(sys.argv[1]), Path(folder) / "report.html")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[] if os.geteuid() else ["--no-sandbox"]
        )
        for name, scheme, height, anchor, update in (
            ("report-curves", "light", 1180, None, 6),
            ("report-update", "light", 760, "this", 6),
            ("report-layers", "dark", 800, "heat", 6),
        ):
            page: Any = browser.new_page(
                viewport={"width": 1000, "height": height}, color_scheme=scheme
            )
            page.goto(f"{path.as_uri()}#{update}")
            page.wait_for_selector("html[data-ready]", state="attached")
            if anchor:
                page.evaluate(
                    "id => scrollTo(0, document.getElementById(id).getBoundingClientRect().top + "
                    "scrollY - 78)",
                    anchor,
                )
            page.wait_for_timeout(200)
            page.screenshot(path=IMAGES / f"{name}.png")
            size = (IMAGES / f"{name}.png").stat().st_size
            print(f"{name}.png {size:,} bytes")
            assert size < MOST_BYTES, f"{name}.png is too large for the repository"
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
