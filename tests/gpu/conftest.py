"""Tests of one GPU take turns: workers of pytest-xdist share it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator

import apart
import pytest


@pytest.fixture(scope="module", autouse=True)
def _gpu_alone() -> Iterator[None]:
    with open(apart.SESSION / "gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
