"""A machine without cards."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: ())
