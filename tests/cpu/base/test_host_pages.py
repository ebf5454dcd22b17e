"""Pages that are locked for a card: whoever maps these addresses next must find them free."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glassloop.base import host_pages
from glassloop.base.host_pages import HostPages, Seen, lock

ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered


class Driver:
    """What CUDA's runtime does with page-locked ranges."""

    def __init__(self) -> None:
        self.locked: set[int] = set()
        self.told: list[str] = []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        if start in self.locked:
            return ALREADY
        self.locked.add(start)
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        self.told.append("unlocked")
        self.locked.remove(start)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(host_pages, "_cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.told.append("waited"))
    return found


def seen_of(pages: torch.Tensor) -> Seen:
    """Two locked ranges of a tensor."""
    assert lock(pages, [(0, 8), (8, 8)], 0) is None
    return Seen(pages, [pages.data_ptr(), pages.data_ptr() + 8])


def test_pages_are_unlocked_before_their_memory_is_given_back(driver: Driver) -> None:
    pages = torch.zeros(16, dtype=torch.uint8)
    seen = seen_of(pages)
    assert len(driver.locked) == 2
    assert lock(pages, [(0, 8)], 0) == f"cudaHostRegister: error {ALREADY}"
    del seen
    assert not driver.locked
    assert driver.told == ["waited", "unlocked", "unlocked"]
    assert lock(pages, [(0, 8)], 0) is None


def test_pages_that_are_closed_are_unlocked_once(driver: Driver) -> None:
    memory = torch.zeros(16, dtype=torch.uint8)
    file = SimpleNamespace(manifest=SimpleNamespace(layers=[]))
    pages = HostPages(
        file,  # type: ignore[arg-type]
        memory,
        torch.device("cuda"),
        shared=None,  # type: ignore[arg-type]
        mapped=memory,
        locked=seen_of(memory),
    )
    pages.close()
    assert not driver.locked and pages.mapped is None
    pages.close()
    del pages
    assert driver.told == ["waited", "unlocked", "unlocked"]


def test_nothing_is_unlocked_that_was_not_locked(driver: Driver) -> None:
    seen = Seen(torch.zeros(16, dtype=torch.uint8))
    del seen
    assert driver.told == []
