"""Host memory of `fused`: exact sizes, what a refusal says, a room that grows."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import weakref

import pytest
import torch

if importlib.util.find_spec("triton") is not None:
    from glassloop.engines.fused import host, pinned
    from glassloop.engines.fused.host import HostRoom
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
PAGE = 4096


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    """Ranges that are locked now; `refuse` is what the driver answers."""

    class Driver:
        def __init__(self) -> None:
            self.locked: dict[int, int] = {}
            self.refuse: str | None = None

        def lock(self, pages, ranges, flags, device):
            assert flags == 0  # written by the card, so not for reading only
            if self.refuse is None:
                self.locked |= {pages.data_ptr() + start: size for start, size in ranges}
            return self.refuse

        def unlock(self, starts, card, process):
            for start in starts:
                del self.locked[start]

    one = Driver()
    monkeypatch.setattr(pinned, "lock", one.lock)
    monkeypatch.setattr(pinned, "unlock", one.unlock)
    monkeypatch.setattr(pinned, "index_of", lambda device: 0)
    return one


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mincore"), reason="needs mincore")
def test_all_pages_are_there_before_a_driver_asks_for_them_one_by_one(driver, monkeypatch):
    counted, size = [], 5 * PAGE

    def lock(pages, ranges, flags, device):
        pages_there = (ctypes.c_ubyte * (pages.numel() // PAGE))()
        start = ctypes.c_void_p(pages.data_ptr())
        assert not ctypes.CDLL(None).mincore(start, ctypes.c_size_t(pages.numel()), pages_there)
        counted.extend(one & 1 for one in pages_there)

    monkeypatch.setattr(pinned, "lock", lock)
    slots = pinned.pinned(3, size)
    assert counted == [1] * 15
    assert not any(slot.any() for slot in slots)
    monkeypatch.setattr(pinned, "unlock", lambda *_: None)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 17])
def test_no_more_is_locked_than_whole_pages(driver, size):
    slots = pinned.pinned(3, size)
    assert [slot.numel() for slot in slots] == [size] * 3
    assert sum(driver.locked.values()) - 3 * size < 3 * PAGE
    assert sorted(driver.locked) == sorted(slot.data_ptr() for slot in slots)  # each its own range
    for number, slot in enumerate(slots):
        slot.fill_(number + 1)
    assert [slot.unique().tolist() for slot in slots] == [[1], [2], [3]]


def test_pages_are_unlocked_when_the_last_tensor_is_gone(driver):
    slots = pinned.pinned(2, PAGE)
    last = slots[1][5:9]
    del slots
    gc.collect()
    assert len(driver.locked) == 2  # a view still needs them
    del last
    gc.collect()
    assert not driver.locked


def test_nothing_is_asked_of_the_driver_for_nothing(driver):
    assert pinned.pinned(0, 9) == pinned.pinned(9, 0) == []


def test_where_the_driver_refuses_torchs_rounded_size_counts(driver, monkeypatch):
    driver.refuse = "cudaHostRegister: error 801"
    taken = []
    made = torch.empty

    def empty(size, *, dtype, pin_memory):
        assert pin_memory
        taken.append(size)
        return made(size, dtype=dtype)

    monkeypatch.setattr(pinned.torch, "empty", empty)
    assert len(pinned.pinned(3, 5 * PAGE, most_bytes=3 * 8 * PAGE)) == 3
    assert taken == [5 * PAGE] * 3
    with pytest.raises(ValueError, match=r"memory\.host_gib: 0\.0 GiB.*error 801.*`ulimit -l`"):
        pinned.pinned(3, 5 * PAGE, most_bytes=3 * 8 * PAGE - 1)

    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(pinned.torch, "empty", full)
    with pytest.raises(ValueError, match=r"memory\.host_gib.*nor 0\.0 GiB by torch"):
        pinned.pinned(3, 5 * PAGE)


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_torch_rounds_up_to_powers_of_two(size, taken):
    assert pinned.rounded_bytes(size) == taken


def test_a_mapping_that_the_system_has_no_room_for_is_refused_by_its_field(driver, monkeypatch):
    monkeypatch.setattr(pinned.torch, "empty", pytest.fail)
    with pytest.raises(ValueError, match=r"memory\.host_gib: .* GiB of host memory cannot be"):
        pinned.pinned(1 << 20, 1 << 40, most_bytes=1)


# --- a room


def test_a_room_keeps_layers_apart_and_grows_for_a_longer_pass():
    room = HostRoom(torch.device("cpu"))
    for tokens, widths in ((5, (3, 2)), (4, (7,)), (9, (3, 2, 3))):
        room.begin(4, tokens, widths, torch.bfloat16)
        layers = [[torch.randn(tokens, w).bfloat16() for w in widths] for _ in range(4)]
        for index, one in enumerate(layers):
            room.put(index, [t.clone() for t in one])
        for index in reversed(range(4)):
            found = room.take(index)
            assert all(torch.equal(a, b) for a, b in zip(found, layers[index], strict=True))
    assert room.bytes == 4 * 9 * 8 * 2
    room.begin(4, 2, (3,), torch.bfloat16)
    assert room.bytes == 4 * 9 * 8 * 2  # a shorter pass makes nothing anew
    room.open(0, 0)
    assert room.bytes == 0


def test_room_is_made_once_for_the_longest_pass_that_is_known():
    room = HostRoom(torch.device("cpu"))
    room.most_tokens = 10
    room.begin(2, 3, (4,), torch.float32)
    slots = [slot.data_ptr() for slot in room.slots]
    room.begin(2, 10, (4,), torch.float32)
    assert [slot.data_ptr() for slot in room.slots] == slots and room.bytes == 2 * 10 * 4 * 4


class Stream:
    """A stream that says what waited for it, and what was alive then."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self.watched: list[weakref.ref[torch.Tensor]] = []

    def wait_stream(self, _other) -> None:
        if self.watched:
            self.alive.append(sum(ref() is not None for ref in self.watched))

    def wait_event(self, _event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> object:
        return object()


def test_a_pass_that_ended_early_keeps_its_tensors_until_their_copies_have_ended(monkeypatch):
    """Or a copy on its way would land in what the next pass has there."""
    computing, room = Stream(), HostRoom(torch.device("cpu"))
    room.stream = Stream()  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        host, "pinned", lambda n, size, *_: [torch.empty(size, dtype=torch.uint8)] * n
    )
    room.begin(2, 4, (3,), torch.float32)
    room.put(0, [torch.randn(4, 3)])
    room.put(1, [torch.randn(4, 3)])
    room.fetch(1)  # and no layer takes it: the pass ended
    (coming, _) = room.coming[1]
    computing.watched = [weakref.ref(one) for one in coming]
    del coming
    room.begin(2, 4, (3,), torch.float32)
    assert computing.alive == [1] and computing.watched[0]() is None
    room.begin(2, 4, (3,), torch.float32)
    assert computing.alive == [1]  # there is nothing to wait for
