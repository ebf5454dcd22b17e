"""A mapped file's pages as a card may read and copy them: page-locked in place, or in a shared copy.

cudaHostRegister with the flag for read-only memory locks a file's own pages in the page cache, so
nothing is copied and every process of a host shares them. Where a driver refuses that (some
containers, WSL), the bytes go once into a file in shared memory that is locked instead.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassloop.base.layer_file import LayerFile, Shared

READ_ONLY = 8  # cudaHostRegisterReadOnly
SHARED_MEMORY = Path("/dev/shm")
THREADS = 8  # that lock pages beside each other
Ranges = Sequence[tuple[int, int]]  # (first byte, bytes): one a layer, for a copy may not cross two


class _Seen:
    """Page-locked host memory, shown to a card as its own."""

    def __init__(self, pages: Tensor):
        self.pages = pages  # lives as long as what is made of it
        self.__cuda_array_interface__ = {
            "shape": tuple(pages.shape),
            "typestr": "|u1",
            "data": (pages.data_ptr(), False),
            "version": 3,
        }


@dataclass
class HostPages:
    """The layers of a file on the host.

    Attributes:
        file: the mapped file.
        memory: (bytes,) uint8 on the CPU, from which layers are copied.
        shared: the tables that all layers read, on the device.
        notes: what a person should know, a line each.
    """

    file: LayerFile
    memory: Tensor = field(repr=False)
    view: Tensor = field(repr=False)  # the same bytes as the device addresses them
    shared: Shared = field(repr=False)
    notes: tuple[str, ...] = ()
    locked: bool = False

    @classmethod
    def of(cls, file: LayerFile, device: torch.device) -> HostPages:
        """Lock a file's layers for `device`; on a CPU there is nothing to lock.

        Raises ValueError naming memory.base where neither its pages nor a copy can be locked.
        """
        shared = file.shared(device)
        if device.type != "cuda":
            return cls(file, file.memory, file.memory, shared)
        ranges = [(layer.offset, layer.nbytes) for layer in file.manifest.layers]
        end = sum(ranges[-1])
        layers = file.memory[:end]
        refused = lock(layers, ranges, READ_ONLY)
        if refused is None:
            view = torch.as_tensor(_Seen(layers), device=device)
            return cls(file, layers, view, shared, locked=True)
        copy = shared_copy(layers, file.folder)
        if (again := lock(copy, ranges, 0)) is not None:
            raise ValueError(
                f"memory.base: neither the pages of {file.folder} ({refused}) nor a copy in "
                f"{SHARED_MEMORY} ({again}) can be page-locked: raise `ulimit -l` and the memory "
                "limit of the container, or set memory.base=gpu"
            )
        note = (
            f"the base's {end / 2**30:.1f} GiB are copied to {SHARED_MEMORY}, since the driver "
            f"does not lock a file's pages ({refused})"
        )
        view = torch.as_tensor(_Seen(copy), device=device)
        return cls(file, copy, view, shared, (note,), locked=True)

    def blob(self, index: int) -> Tensor:
        """(bytes,) uint8 on the CPU: a layer's blob, to be copied."""
        place = self.file.manifest.layers[index]
        return self.memory[place.offset : place.offset + place.nbytes]

    def seen(self, index: int) -> Tensor:
        """(bytes,) uint8: the same blob, read by the device through its bus."""
        place = self.file.manifest.layers[index]
        return self.view[place.offset : place.offset + place.nbytes]

    def close(self) -> None:
        """Unlock the pages; nothing may read them through `seen` any more."""
        if self.locked:
            for layer in self.file.manifest.layers:
                _cudart().cudaHostUnregister(self.memory.data_ptr() + layer.offset)
        self.locked = False


def lock(pages: Tensor, ranges: Ranges, flags: int) -> str | None:
    """Page-lock ranges of host memory beside each other. Returns why it was refused, else None."""
    base, device = pages.data_ptr(), torch.cuda.current_device()

    def one(place: tuple[int, int]) -> int:
        torch.cuda.set_device(device)
        code = _cudart().cudaHostRegister(base + place[0], place[1], flags)
        return int(getattr(code, "value", code))

    with ThreadPoolExecutor(THREADS) as pool:
        codes = list(pool.map(one, ranges))
    if not any(codes):
        return None
    for (start, _), code in zip(ranges, codes, strict=True):
        if not code:
            _cudart().cudaHostUnregister(base + start)
    return f"cudaHostRegister: error {next(code for code in codes if code)}"


def shared_copy(pages: Tensor, folder: Path) -> Tensor:
    """The bytes in a file in shared memory, made once a host for all processes of one user."""
    key = hashlib.sha256(f"{os.getuid()}:{folder}".encode()).hexdigest()[:16]
    path, size = SHARED_MEMORY / f"glassloop-{key}", pages.numel()
    if not (path.is_file() and not path.is_symlink() and path.stat().st_size == size):
        stat = os.statvfs(SHARED_MEMORY)
        if stat.f_bavail * stat.f_frsize < size:
            raise ValueError(
                f"memory.base: {SHARED_MEMORY} has {stat.f_bavail * stat.f_frsize / 2**30:.1f} GiB "
                f"free, the base needs {size / 2**30:.1f}: enlarge it (docker: --shm-size), or set "
                "memory.base=gpu"
            )
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=SHARED_MEMORY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(memoryview(pages.numpy()))
        os.replace(temporary, path)
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise ValueError(f"memory.base: {path} belongs to another user: remove it")
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _cudart() -> Any:
    return torch.cuda.cudart()
