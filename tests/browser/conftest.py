"""Pages in headless Chromium, watched: what they ask a network for, what they complain of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@dataclass
class Opened:
    """A page that is ready, and everything that it did on the way."""

    page: Any
    complaints: list[str] = field(
        default_factory=list
    )  # console errors and warnings, refusals of the policy, exceptions
    requests: list[str] = field(default_factory=list)  # but the file itself

    def js(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'glassloop[test]'"
    )
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """open_page(file, **settings of the browser's page) -> Opened."""
    pages = []

    def opened(path: Path, **settings: Any) -> Opened:
        page = browser.new_page(**{"viewport": {"width": 1000, "height": 800}, **settings})
        pages.append(page)
        watched = Opened(page)
        page.on(
            "console",
            lambda message: (
                watched.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                watched.requests.append(request.url) if request.url != path.as_uri() else None
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000, state="attached")
        return watched

    yield opened
    for page in pages:
        page.close()
