"""Page-locked host memory of exact sizes.

torch rounds a pinned request up to a power of two: 5 GiB take 8. Here one mapping has the size that
is asked for, and the driver locks its pages where they are. Where a driver refuses that, torch's
own pinned memory serves, and its true size counts.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from glassloop.base.host_pages import index_of, lock, unlock
from glassloop.predict.tiers import PAGE, slot_bytes_of


class Mapping(mmap.mmap):
    """An anonymous mapping whose pages are unlocked before they are unmapped."""

    starts: tuple[int, ...] = ()  # addresses of the ranges that are locked
    card = process = 0  # whose driver locked them, and for whom

    def __del__(self) -> None:
        if self.starts and not sys.is_finalizing():  # the driver ends with the process
            unlock(self.starts, self.card, self.process)


def pinned(
    slots: int,
    slot_bytes: int,
    most_bytes: int | None = None,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Lock host memory for `slots` tensors, (slot_bytes,) uint8 each.

    Args:
        most_bytes: the most that all may take, where only torch's rounded sizes are to be had.
        device: that copies from and to them; None: the current one.

    Raises:
        ValueError: naming memory.host_gib, where the system locks no such memory.
    """
    if not slots or not slot_bytes:
        return []
    stride = slot_bytes_of(slot_bytes)
    try:
        found = _mapped(slots, stride, device)
    except OSError as error:
        found = str(error)
    if not isinstance(found, str):
        return [found[slot * stride : slot * stride + slot_bytes] for slot in range(slots)]
    wanted, rounded = slots * stride, slots * rounded_bytes(slot_bytes)
    asked = f"memory.host_gib: {wanted / 2**30:.1f} GiB of host memory cannot be locked ({found})"
    cure = "raise the memory limit of the container or `ulimit -l`, or set memory.host_gib lower"
    if most_bytes is not None and rounded > most_bytes:
        raise ValueError(
            f"{asked}, and torch's pinned memory takes {rounded / 2**30:.1f} GiB of "
            f"{most_bytes / 2**30:.1f} that may be taken: {cure}"
        )
    try:
        return [torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(slots)]
    except RuntimeError as error:
        raise ValueError(f"{asked}, nor {rounded / 2**30:.1f} GiB by torch: {cure}") from error


def touch(memory: Tensor) -> None:
    """Have the system give all pages of (bytes,) uint8, by several threads.

    A driver locks range after range and would wait for each page: 3 GiB/s on an H200's host, where
    one thread fills 10 on a small CPU and two fill 21.
    """
    threads = min(16, os.cpu_count() or 1)
    parts = memory.view(-1, PAGE).chunk(4 * threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part[:, 0].zero_(), parts))


def rounded_bytes(size: int) -> int:
    """Bytes that torch's pinned allocator takes for a request."""
    return 1 << (size - 1).bit_length()


def _mapped(slots: int, stride: int, device: torch.device | None) -> Tensor | str:
    """(bytes,) uint8, locked slot by slot; or why the driver refused."""
    assert stride % PAGE == 0
    mapping = Mapping(-1, slots * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_DONTFORK)  # or a child process would get a copy of locked pages
    with contextlib.suppress(OSError):  # a kernel without large pages: small ones do
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    touch(memory)
    # A range a slot: ranges are locked beside each other, and no copy crosses two.
    starts = [slot * stride for slot in range(slots)]
    refused = lock(memory, [(start, stride) for start in starts], 0, device)
    if refused is not None:
        return refused
    mapping.starts = tuple(memory.data_ptr() + start for start in starts)
    mapping.card, mapping.process = index_of(device), os.getpid()
    return memory
