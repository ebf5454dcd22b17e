"""Pages that are locked for a card: whoever maps these addresses next must find them free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glassloop.base import host_pages
from glassloop.base.host_pages import READ_ONLY, HostPages, Seen, lock, shared_copy, shared_path
from glassloop.base.layer_file import BLOBS
from glassloop.engines.fused import pinned

ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered
NOT_SUPPORTED = 801  # cudaErrorNotSupported
CARD = torch.device("cuda", 1)


class Driver:
    """What CUDA's runtime does with page-locked ranges."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}  # address: card
        self.told: list[str] = []
        self.refuses: int | None = None  # these flags
        self.cards = threading.local()  # a thread's current one: 0 where it chose none

    @property
    def card(self) -> int:
        return getattr(self.cards, "number", 0)

    def choose(self, card: Any) -> None:
        self.cards.number = card.index if isinstance(card, torch.device) else card

    @contextmanager
    def on(self, card: int) -> Iterator[None]:
        before, self.cards.number = self.card, card
        yield
        self.cards.number = before

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        if flags == self.refuses:
            return NOT_SUPPORTED
        if start in self.locked:
            return ALREADY
        self.locked[start] = self.card
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        assert self.locked.pop(start) == self.card, "another card's driver is told"
        self.told.append("unlocked")
        return 0

    def synchronize(self, card: int | None = None) -> None:
        self.told.append(f"waited for {self.card if card is None else card}")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(host_pages, "_cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.card)
    monkeypatch.setattr(torch.cuda, "set_device", found.choose)
    monkeypatch.setattr(torch.cuda, "device", found.on)
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    return found


def seen_of(pages: torch.Tensor, device: torch.device | None = None) -> Seen:
    """Two locked ranges of a tensor."""
    assert lock(pages, [(0, 8), (8, 8)], 0, device) is None
    return Seen(pages, [pages.data_ptr(), pages.data_ptr() + 8], device)


def in_a_thread(action: Any) -> None:
    """Do it in a thread that never chose a card."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def test_pages_are_unlocked_before_their_memory_is_given_back(driver: Driver) -> None:
    pages = torch.zeros(16, dtype=torch.uint8)
    seen = seen_of(pages)
    assert len(driver.locked) == 2
    assert lock(pages, [(0, 8)], 0) == f"cudaHostRegister: error {ALREADY}"
    del seen
    assert not driver.locked
    assert driver.told == ["waited for 0", "unlocked", "unlocked"]
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
    assert driver.told == ["waited for 0", "unlocked", "unlocked"]


def test_nothing_is_unlocked_that_was_not_locked(driver: Driver) -> None:
    seen = Seen(torch.zeros(16, dtype=torch.uint8))
    del seen
    assert driver.told == []


def test_pages_are_unlocked_by_the_card_that_locked_them_whoever_finds_them_unused(
    driver: Driver,
) -> None:
    """Garbage is collected in any thread: that of card 0 waits for no copy of card 1."""
    pages = torch.zeros(16, dtype=torch.uint8)
    held = [seen_of(pages, CARD)]
    assert set(driver.locked.values()) == {1}
    in_a_thread(held.clear)
    assert driver.told == ["waited for 1", "unlocked", "unlocked"]


def test_locked_memory_of_layers_is_given_back_by_its_own_card(driver: Driver) -> None:
    held = [pinned.pinned(2, 100, device=CARD)]
    assert set(driver.locked.values()) == {1}
    in_a_thread(held.clear)
    assert driver.told == ["waited for 1", "unlocked", "unlocked"]


def test_a_child_process_unlocks_nothing_of_its_parent(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, pages = os.getpid(), torch.zeros(16, dtype=torch.uint8)
    seen, memory = seen_of(pages), pinned.pinned(1, 100)
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    del seen, memory
    assert driver.told == [] and len(driver.locked) == 3


def pages_of(folder: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> HostPages:
    """Pages over a file of one layer of 16 bytes, not locked yet."""
    (folder / "shm").mkdir(exist_ok=True)
    monkeypatch.setattr(host_pages, "SHARED_MEMORY", folder / "shm")
    monkeypatch.setattr(torch, "as_tensor", lambda seen, device: seen.pages)
    layer = SimpleNamespace(offset=0, nbytes=16)
    raw = torch.frombuffer(bytearray((folder / BLOBS).read_bytes()), dtype=torch.uint8)
    file = SimpleNamespace(folder=folder, memory=raw, manifest=SimpleNamespace(layers=[layer]))
    return HostPages(file, raw, CARD, shared=None)  # type: ignore[arg-type]


def test_pages_that_torch_would_copy_to_another_card_are_not_called_locked(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / BLOBS).write_bytes(bytes(range(16)))
    pages = pages_of(tmp_path, driver, monkeypatch)
    monkeypatch.setattr(torch, "as_tensor", lambda seen, device: seen.pages.clone())
    assert "copy the pages" in str(pages._lock())
    assert pages.mapped is None and not driver.locked


def test_a_base_that_gets_its_name_keeps_its_copy_in_shared_memory(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is checked under a temporary name first: a second copy would be another base."""
    driver.refuses = READ_ONLY
    made, named = tmp_path / ".made", tmp_path / "named"
    made.mkdir()
    (made / BLOBS).write_bytes(bytes(range(16)))
    first = pages_of(made, driver, monkeypatch)
    monkeypatch.setattr(host_pages, "SHARED_MEMORY", tmp_path)
    assert first._lock() is None
    first.close()
    made.rename(named)
    second = pages_of(named, driver, monkeypatch)
    monkeypatch.setattr(host_pages, "SHARED_MEMORY", tmp_path)
    assert second._lock() is None
    assert second.memory.tolist() == list(range(16))
    assert len(list(tmp_path.glob("glassloop-*"))) == 1


def test_a_base_that_is_made_again_does_not_find_the_copy_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be told as damaged, to be deleted once more, for ever."""
    monkeypatch.setattr(host_pages, "SHARED_MEMORY", tmp_path)
    file = tmp_path / BLOBS
    for value in (1, 2):
        kept = tmp_path / f"other{value}"  # so that the number of the file is not given again
        file.write_bytes(bytes([value] * 16))
        pages = torch.full((16,), value, dtype=torch.uint8)
        assert shared_copy(pages, file).tolist() == [value] * 16
        file.rename(kept)


def test_a_copy_in_shared_memory_that_is_not_its_file_is_forgotten(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / BLOBS).write_bytes(bytes(range(16)))
    pages = pages_of(tmp_path, driver, monkeypatch)
    shared_copy(pages.memory, tmp_path / BLOBS)
    pages.forget_copy()
    assert not shared_path(tmp_path / BLOBS).exists()
    pages.forget_copy()
