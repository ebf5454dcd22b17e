"""A watch over one GPU's allocator, for the moment it fails."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glassloop.disk.opening import NotPlain, require_plain_folder
from glassloop.disk.publish import make, replace_file

FOLDER = "out_of_memory"
KEPT = 100_000  # allocations and frees that the snapshot can name


@dataclass(frozen=True)
class Seen:
    """The card at the moment in which an allocation failed, in bytes."""

    asked: int  # by the allocation that failed
    allocated: int  # by tensors
    reserved: int  # by torch's allocator, `allocated` included
    free: int  # on the card, for every process
    total: int  # of the card
    snapshot: str | None  # name of its file; None if the disk refused it

    @property
    def others(self) -> int:
        """Held by CUDA itself and by other processes."""
        return max(0, self.total - self.free - self.reserved)


class Witness:
    """Watches one rank's allocator.

    Args:
        folder: the run's. cuda: torch.cuda, or what stands in for it.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, cuda: Any = None) -> None:
        self.folder, self.rank, self.device = folder / FOLDER, rank, device
        self.cuda = torch.cuda if cuda is None else cuda
        self.seen: Seen | None = None
        self.over = False

    def attach(self) -> None:
        """Record allocations, and watch for one that fails. Nothing without a GPU."""
        if self.device.type == "cuda":
            history = self.cuda.memory._record_memory_history
            history("all", context=None, stacks="python", max_entries=KEPT)
            torch._C._cuda_attach_out_of_memory_observer(self.observe)  # type: ignore[attr-defined]

    def detach(self) -> None:
        """See nothing more.

        torch keeps an observer as long as the process lives.
        """
        if self.device.type == "cuda" and not self.over:
            self.over = True
            self.cuda.memory._record_memory_history(enabled=None)

    def observe(self, _device: int, asked: int, _allocated: int, _free: int) -> None:
        """Called by torch when an allocation has failed, before it raises."""
        if not self.over:
            # An error here would take the place of the lack of memory, which is what ends the pass.
            with suppress(Exception):
                self.seen = self._look(int(asked))

    def _look(self, asked: int) -> Seen:
        free, total = self.cuda.mem_get_info(self.device)
        return Seen(
            asked=asked,
            allocated=self.cuda.memory_allocated(self.device),
            reserved=self.cuda.memory_reserved(self.device),
            free=free,
            total=total,
            snapshot=self._snapshot(),
        )

    def take(self) -> Seen | None:
        """What was seen since the last call."""
        seen, self.seen = self.seen, None
        return seen

    def _snapshot(self) -> str | None:
        path = self.folder / f"rank{self.rank}.pickle"
        try:
            require_plain_folder(self.folder)
            make(self.folder)
            data = pickle.dumps(self.cuda.memory._snapshot())
            replace_file(path, data, durable=False)
        except (OSError, NotPlain, MemoryError, RuntimeError):  # a full disk, or a full host
            return None
        return path.name
