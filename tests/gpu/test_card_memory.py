"""Memory that a stream still reads, and errors of a real card."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from glassloop.base.host_pages import HostPages, Seen, lock
from glassloop.base.quantised import load_base
from glassloop.base.streamed import load_streamed
from glassloop.config import ModelConfig
from glassloop.engines.fused.host import HostRoom
from glassloop.engines.fused.pinned import pinned
from glassloop.loop.replica import card_name
from glassloop.loop.witness import FOLDER, Witness
from glassloop.plan.support import groups_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CARD = torch.device("cuda", 0)
MIB = 2**20
LONG = 50_000_000  # clock cycles of a card: 25 ms or more


def in_a_thread(action) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def test_pages_that_another_thread_drops_are_read_to_the_end_first() -> None:
    """A thread that never chose a card unlocks them; a copy of 256 MiB is under way."""
    for value in (1, 2):  # the second time at addresses that were locked, if the system gives them
        held = pinned(1, 256 * MIB, device=CARD)
        held[0].fill_(value)
        there = torch.empty(256 * MIB, dtype=torch.uint8, device=CARD)
        torch.cuda._sleep(LONG)
        there.copy_(held[0], non_blocking=True)
        in_a_thread(held.clear)
        assert int(there.min()) == int(there.max()) == value


def test_the_current_card_of_the_thread_that_drops_pages_stays() -> None:
    pages = torch.ones(4096, dtype=torch.uint8)
    assert lock(pages, [(0, 4096)], 0, CARD) is None
    held, current = [Seen(pages, [pages.data_ptr()], CARD)], []

    def drop() -> None:
        held.clear()
        current.append(torch.cuda.current_device())

    in_a_thread(drop)
    assert current == [0]
    assert lock(pages, [(0, 4096)], 0, CARD) is None  # they are free again
    Seen(pages, [pages.data_ptr()], CARD).unlock()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_pages_of_the_second_card_are_unlocked_by_it() -> None:
    second = torch.device("cuda", 1)
    before = torch.cuda.memory_allocated(second)
    held = pinned(1, 256 * MIB, device=second)
    held[0].fill_(7)
    seen = torch.as_tensor(Seen(held[0]), device=second)
    there = torch.empty(256 * MIB, dtype=torch.uint8, device=second)
    with torch.cuda.device(second):
        torch.cuda._sleep(LONG)
        there.copy_(held[0], non_blocking=True)
    del seen
    in_a_thread(held.clear)
    assert int(there.min()) == int(there.max()) == 7
    del there
    assert torch.cuda.memory_allocated(second) == before


@pytest.mark.parametrize("device", [CARD, torch.device("cuda")])
def test_locked_pages_are_shown_to_the_card_and_not_copied(
    tiny_llama: Path, tmp_path: Path, device: torch.device
) -> None:
    model = ModelConfig(id=str(tiny_llama), quantization="nf4", cache_dir=str(tmp_path))
    hf, _, pages = load_streamed(
        model, groups_of, precision="bf16", device=device, first=nullcontext, locking="must"
    )
    assert pages.mapped is not None and pages.mapped.data_ptr() == pages.memory.data_ptr()
    file = pages.file
    del hf
    pages.close()
    before = torch.cuda.memory_allocated()
    again = HostPages.of(file, device, "must")
    taken = torch.cuda.memory_allocated() - before
    assert taken < 64 * 1024  # the tables that all layers read
    again.close()


def test_what_a_pass_that_ended_early_was_fetching_lands_in_no_other_tensor() -> None:
    room, rows = HostRoom(CARD), 64 * MIB // 4
    for _ in range(3):
        room.begin(1, rows, (1,), torch.float32)
        room.put(0, [torch.full((rows, 1), 1.0, device=CARD)])
        room.fetch(0)  # and no layer takes it
        room.begin(1, rows, (1,), torch.float32)
        other = torch.zeros(rows, 1, device=CARD)  # where it lay, if the allocator has no other
        torch.cuda.synchronize()
        assert float(other.abs().max()) == 0.0
        del other


def test_a_card_that_is_full_while_a_base_is_loaded_is_said_and_deletes_no_copy(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = ModelConfig(id=str(tiny_llama), quantization="nf4", cache_dir=str(tmp_path))

    def load() -> bool:
        _, report = load_base(model, precision="bf16", device=CARD, first=nullcontext)
        return report.from_cache

    load()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CARD).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved(CARD) + 1024) / total, CARD
    )
    rest = []
    try:
        with suppress(torch.OutOfMemoryError):
            while True:  # what torch has cut from a larger piece would hold a small base
                rest.append(torch.empty(512, dtype=torch.uint8, device=CARD))
        with pytest.raises(torch.OutOfMemoryError):
            load()
    finally:
        rest.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, CARD)
    assert len(list(tmp_path.glob("quantized/*"))) == 1
    assert load()


def test_a_lack_of_memory_is_seen_by_the_run_that_is_under_way_alone(tmp_path: Path) -> None:
    past, present = (Witness(tmp_path / name, 0, CARD) for name in ("past", "present"))
    past.attach()
    past.detach()
    present.attach()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device=CARD)
    present.detach()
    seen = present.take()
    assert past.take() is None and seen is not None and seen.asked >= 2**50
    assert (tmp_path / "present" / FOLDER / "rank0.pickle").is_file()
    assert not (tmp_path / "past").exists()


def test_a_card_has_a_name_that_is_not_its_number() -> None:
    names = [card_name(torch.device("cuda", one)) for one in range(torch.cuda.device_count())]
    assert len(set(names)) == len(names) and not any("cuda" in name for name in names)
