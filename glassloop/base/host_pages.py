"""A mapped file's pages, readable by a card.

cudaHostRegister with the flag for read-only memory locks a file's own pages in the page cache, so
nothing is copied and every process of a host shares them. Where a driver refuses that (some
containers, WSL), the bytes go once into a file in shared memory that is locked instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glassloop.base.layer_file import BLOBS, LayerFile, Shared
from glassloop.base.source import BaseError

READ_ONLY = 8  # cudaHostRegisterReadOnly
SHARED_MEMORY = Path("/dev/shm")
THREADS = 8  # that lock pages beside each other
Ranges = Sequence[tuple[int, int]]  # (first byte, bytes): one a layer, for a copy may not cross two


class Seen:
    """Page-locked host memory, shown to a card as its own.

    It is unlocked when the last tensor that is made of it dies. A driver that is not told takes
    what is mapped at the same addresses later for these pages, and copies read what they were.

    Args:
        locked: addresses of locked ranges that nothing else unlocks.
        device: whose driver locked them; None: the current one.
    """

    def __init__(
        self, pages: Tensor, locked: Sequence[int] = (), device: torch.device | None = None
    ):
        self.pages = pages  # lives as long as what is made of it
        card = index_of(device) if locked else 0
        self.unlock = weakref.finalize(self, unlock, tuple(locked), card, os.getpid())
        self.unlock.atexit = False  # the driver ends with the process
        self.__cuda_array_interface__ = {
            "shape": tuple(pages.shape),
            "typestr": "|u1",
            "data": (pages.data_ptr(), False),
            "version": 3,
        }


Locking = Literal["no", "try", "must"]


@dataclass
class HostPages:
    """The layers of a file, on the host or on the device.

    Attributes:
        file: the mapped file.
        memory: (bytes,) uint8 on the CPU, from which layers are copied.
        shared: the tables that all layers read, on the device.
        mapped: (bytes,) uint8, `memory` as the device addresses it; None if it is not locked.
        locked: what unlocks it.
        on_card: layers whose blob has a copy on the device.
        ranks: that keep a part of the layers each (base/sharded.py).
        peers: layers that lie on a card, this one or another rank's.
        own: those of them that lie on this one.
        notes: what a person should know, a line each.
    """

    file: LayerFile
    memory: Tensor = field(repr=False)
    device: torch.device
    shared: Shared = field(repr=False)
    mapped: Tensor | None = field(default=None, repr=False)
    locked: Seen | None = field(default=None, repr=False)
    on_card: dict[int, Tensor] = field(default_factory=dict, repr=False)
    ranks: int = 1
    peers: dict[int, Tensor] = field(default_factory=dict, repr=False)
    own: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: LayerFile, device: torch.device, locking: Locking = "try") -> HostPages:
        """Lock a file's layers for `device`, or bring them there.

        Args:
            locking: no: bring all layers to the device. try: lock them if the system allows it,
                else bring them. must: lock them. On a CPU there is nothing to lock.

        Raises:
            BaseError: naming memory.base, where they must be locked and neither the file's pages
                nor a copy can be.
        """
        shared = file.shared(device)
        if device.type != "cuda":
            return cls(file, file.memory, device, shared, file.memory)
        pages = cls(file, file.memory, device, shared)
        refused = None if locking == "no" else pages._lock()
        if refused is not None and locking == "must":
            raise BaseError(
                f"memory.base: {refused}: raise `ulimit -l` and the memory limit of the container, "
                "or set memory.base=gpu"
            )
        if refused is not None:
            pages.notes = (f"the base cannot stream on this machine: {refused}",)
        if pages.mapped is None:
            for index in range(len(file.manifest.layers)):
                pages.bring(index)
        return pages

    def _lock(self) -> str | None:
        """Lock the file's pages, or a copy of them.

        Returns why neither could be.
        """
        ranges = [(layer.offset, layer.nbytes) for layer in self.file.manifest.layers]
        end = sum(ranges[-1])
        own = self.file.memory[:end]
        if (refused := lock(own, ranges, READ_ONLY, self.device)) is not None:
            try:
                own = shared_copy(own, self.file.folder / BLOBS)
            except (OSError, ValueError) as error:
                return f"the driver does not lock a file's pages ({refused}), and {error}"
            if (again := lock(own, ranges, 0, self.device)) is not None:
                return f"neither a file's pages ({refused}) nor shared memory ({again}) is locked"
            self.notes = (
                f"the base's {end / 2**30:.1f} GiB are copied to {SHARED_MEMORY}, since the driver "
                f"does not lock a file's pages ({refused})",
            )
        seen = Seen(own, [own.data_ptr() + start for start, _ in ranges], self.device)
        mapped = torch.as_tensor(seen, device=self.device)
        if mapped.data_ptr() != own.data_ptr():  # torch took the pages for another card's
            return "torch would copy the pages to the card instead of showing them"
        self.memory, self.locked, self.mapped = own, seen, mapped
        return None

    @property
    def host_bytes(self) -> int:
        """Bytes of layers that have no copy on the device."""
        layers = enumerate(self.file.manifest.layers)
        return sum(layer.nbytes for index, layer in layers if index not in self.on_card)

    def blob(self, index: int) -> Tensor:
        """A layer's blob to copy: (bytes,) uint8, on CPU or card."""
        if index in self.peers:
            return self.peers[index]
        return self._part(self.memory, index)

    def seen(self, index: int) -> Tensor:
        """(bytes,) uint8: the blob as the device reads it.

        It lies on the device, or is read through its bus.
        """
        if index in self.on_card:
            return self.on_card[index]
        assert self.mapped is not None
        return self._part(self.mapped, index)

    def bring(self, index: int) -> None:
        """Have a copy of a layer's blob on the device."""
        self.on_card[index] = self.blob(index).to(self.device, copy=True)

    def send_back(self, index: int) -> None:
        """Drop the copy on the device; the host's is read."""
        assert self.mapped is not None, "these pages are not locked"
        del self.on_card[index]

    def close(self) -> None:
        """Unlock the pages; nothing may read them through `seen` any more."""
        if self.locked is not None:
            self.locked.unlock()
        self.mapped = self.locked = None

    def forget_copy(self) -> None:
        """Remove a copy in shared memory that differs from the file."""
        shared_path(self.file.folder / BLOBS).unlink(missing_ok=True)

    def _part(self, memory: Tensor, index: int) -> Tensor:
        place = self.file.manifest.layers[index]
        return memory[place.offset : place.offset + place.nbytes]


def index_of(device: torch.device | None) -> int:
    """Number of a card; of the current one if it has none."""
    if device is None or device.index is None:
        return torch.cuda.current_device()
    return device.index


def lock(
    pages: Tensor, ranges: Ranges, flags: int, device: torch.device | None = None
) -> str | None:
    """Page-lock adjacent ranges of host memory; returns why it was refused.

    Args:
        device: that will read them; None: the current one.
    """
    base, card = pages.data_ptr(), index_of(device)

    def one(place: tuple[int, int]) -> int:
        torch.cuda.set_device(card)
        code = _cudart().cudaHostRegister(base + place[0], place[1], flags)
        return int(getattr(code, "value", code))

    with ThreadPoolExecutor(THREADS) as pool:
        codes = list(pool.map(one, ranges))
    if not any(codes):
        return None
    done = [base + start for (start, _), code in zip(ranges, codes, strict=True) if not code]
    unlock(done, card, os.getpid())
    return f"cudaHostRegister: error {next(code for code in codes if code)}"


def unlock(starts: Sequence[int], card: int, process: int) -> None:
    """Unlock the ranges that begin here.

    It waits for the copies of their card that are under way. Any thread may find that they are
    garbage, and one that never chose a card has card 0. A child of the process that locked them
    inherits the memory, not the driver.
    """
    if not starts or os.getpid() != process:
        return
    with contextlib.suppress(RuntimeError), torch.cuda.device(card):
        with contextlib.suppress(RuntimeError):  # a card that failed copies nothing
            torch.cuda.synchronize(card)
        for start in starts:
            _cudart().cudaHostUnregister(start)


def shared_copy(pages: Tensor, file: Path) -> Tensor:
    """Copy a file's bytes into shared memory, once a host and user."""
    path, size = shared_path(file), pages.numel()
    if not (path.is_file() and not path.is_symlink() and path.stat().st_size == size):
        stat = os.statvfs(SHARED_MEMORY)
        if stat.f_bavail * stat.f_frsize < size:
            raise ValueError(
                f"{SHARED_MEMORY} has {stat.f_bavail * stat.f_frsize / 2**30:.1f} GiB "
                f"free of {size / 2**30:.1f} that a copy needs (docker: --shm-size)"
            )
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=SHARED_MEMORY)
        try:
            with os.fdopen(descriptor, "wb") as copy:
                pages.numpy().tofile(copy)
            os.replace(temporary, path)
        except BaseException:  # a quota, Ctrl-C: it would take memory until the next boot
            os.unlink(temporary)
            raise
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise ValueError(f"{path} belongs to another user: remove it")
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def shared_path(file: Path) -> Path:
    """File in shared memory of this user's copy of a file.

    It belongs to the file, not to its name: one that is moved keeps its copy, and one that is
    written again at the same place does not find the copy of what was there.
    """
    found = file.stat()
    identity = (os.getuid(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return SHARED_MEMORY / f"glassloop-{key}"


def _cudart() -> Any:
    return torch.cuda.cudart()
