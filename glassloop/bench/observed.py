"""Numbers of an arm's run beside its clock: tokens, times, memory, card."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence

import torch

from glassloop.bench.spec import Spec
from glassloop.bench.sums import Tokens
from glassloop.data.batches import Batches, Window, build_pass
from glassloop.data.rows import Row
from glassloop.loop.run import Run
from glassloop.record.records import UpdateRecord

GIB = 2**30


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_of(records: Sequence[UpdateRecord]) -> Tokens:
    """Tokens of all ranks."""
    real, slot = sum(one.real_tokens for one in records), sum(one.slot_tokens for one in records)
    return Tokens(real, sum(one.supervised_tokens for one in records), slot)


def shares(run: Run, spec: Spec, records: Sequence[UpdateRecord], total: float) -> dict[str, float]:
    """Parts of an update's wall time on rank 0.

    data: measured apart, by building the same passes once more.
    passes: building, forward, backward and the ranks' reports, so it holds `data` and waiting for
        other ranks.
    reduce: sum over ranks and the norm.
    optimizer: until it was started.
    rest: records, observers, and the device finishing the step.
    """
    parts = {
        "passes": sum(one.compute_s for one in records) / total,
        "reduce": sum(one.reduce_s for one in records) / total,
        "optimizer": sum(one.optimizer_s for one in records) / total,
    }
    parts["rest"] = 1 - sum(parts.values())
    began = time.perf_counter()
    for window in windows(run.batches, spec):
        for rows in window.passes[run.replica.rank]:
            build_pass(
                [run.batches.rows[row] for row in rows],
                packed=window.packed,
                pad_id=run.replica.pad_id,
                device=run.replica.device,
            )
    wait_for(run.replica.device)
    return parts | {"data": (time.perf_counter() - began) / total}


def passes_of(batches: Batches, spec: Spec) -> list[list[Row]]:
    """Rows of every pass of every rank in the measured updates."""
    ranks = (rank for window in windows(batches, spec) for rank in window.passes)
    return [[batches.rows[row] for row in one] for rank in ranks for one in rank]


def windows(batches: Batches, spec: Spec) -> list[Window]:
    """Those of the measured updates."""
    return [batches.window(u) for u in spec.measured_updates]


def memory_of(device: torch.device) -> dict[str, float | None]:
    """This rank's peaks in GiB since the base was loaded.

    The host's peak counts since the process began (ru_maxrss, KiB on Linux).
    """
    on_cuda = device.type == "cuda"
    return {
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB if on_cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB if on_cuda else None,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def uuid_of(device: torch.device) -> str | None:
    """The card's name for nvidia-smi and NVML."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def p2p_of(device: torch.device) -> bool | None:
    """Tell if the first two cards reach each other's memory."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    return torch.cuda.can_device_access_peer(0, 1)
