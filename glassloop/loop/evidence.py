"""Evidence of a lack of GPU memory, taken while the allocation fails.

torch calls an observer before it raises: then everything that filled the card still lies there.
Afterwards the failed pass's tensors are gone. Each rank leaves two files in the run's folder:

    out_of_memory/rank0.json        what held the memory, beside the ledger's prediction
    out_of_memory/rank0.pickle      torch's snapshot, for https://docs.pytorch.org/memory_viz

The snapshot has the blocks and the last allocations by size and time; it holds no data of tensors.
glassloop writes it in torch's own format and never reads one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glassloop.disk.opening import NotPlain, require_plain_folder
from glassloop.disk.publish import make, write_json
from glassloop.formula.dist import gather_objects
from glassloop.loop.memory import ledger_of_pass
from glassloop.loop.witness import FOLDER, Seen
from glassloop.predict.terms import GIB, Ledger

if TYPE_CHECKING:
    from collections.abc import Collection

    from glassloop.data.batches import Window
    from glassloop.data.rows import Row
    from glassloop.loop.run import Run

SCHEMA = 1  # of rank0.json


def account_of(
    seen: Seen, *, update: int, rank: int, resident: dict[str, int], ledger: Ledger | None
) -> dict[str, Any]:
    """A table of what held the memory, in GiB, for rank0.json.

    Args:
        resident: bytes of what lies on the card for the whole run, by name.
        ledger: the prediction for the rank's heaviest pass; None: unknown.
    """
    phases = {} if ledger is None else ledger.phases
    peak = max((phase for phase in phases if phase != "peak"), key=phases.__getitem__, default=None)
    terms = [] if ledger is None else [one for one in ledger.terms if peak in one.phases]
    passes = max(0, seen.allocated - sum(resident.values()))
    held = resident | {
        "activations and workspaces of the pass": passes,
        "reserved by torch, not in use": seen.reserved - seen.allocated,
        "CUDA itself and other processes": seen.others,
        "free": seen.free,
    }
    return {
        "schema": SCHEMA,
        "update": update,
        "rank": rank,
        "asked_gib": _gib(seen.asked),
        "card_gib": _gib(seen.total),
        "held_gib": {name: _gib(size) for name, size in held.items()},
        "predicted_phase": peak,
        "predicted_gib": {one.what: _gib(one.size_bytes) for one in terms},
        "predicted_peak_gib": None if peak is None else _gib(phases[peak]),
        "snapshot": seen.snapshot,
    }


def in_words(account: dict[str, Any]) -> str:
    """One rank's table as a sentence."""
    held = account["held_gib"]
    parts = ", ".join(f"{name} {size:.2f}" for name, size in held.items() if size >= 0.005)
    predicted = account["predicted_peak_gib"]
    beside = "" if predicted is None else f"; the ledger predicted {predicted:.2f} GiB of tensors"
    return (
        f"rank {account['rank']} asked for {account['asked_gib']:.2f} GiB of a card of "
        f"{account['card_gib']:.2f} GiB that held, in GiB: {parts}{beside}"
    )


def leave_evidence(run: Run, window: Window, short: Collection[int]) -> None:
    """Write what each rank's allocator saw, and say so.

    All ranks take part.

    Call it before the run reacts. Nothing without a GPU.

    Args:
        window: of the update that failed. short: ranks that ran out of memory.
    """
    replica = run.replica
    if replica.device.type != "cuda" or run.witness is None:
        return
    seen, account = run.witness.take(), None
    if seen is not None and replica.rank in short:
        rows = heaviest_rows(run, window.computed_by(replica.rank))
        account = account_of(
            seen,
            update=run.at,
            rank=replica.rank,
            resident=resident_bytes(run),
            ledger=ledger_of_pass(run, rows),
        )
        account["written"] = _written(run.folder / FOLDER, account)
    for one in gather_objects(account):
        if one is not None:
            files = f" ({run.folder / FOLDER}/rank{one['rank']}.json)" if one["written"] else ""
            run.event(run.at, "memory_account", f"{in_words(one)}{files}", account=one)


def heaviest_rows(run: Run, passes: tuple[tuple[int, ...], ...]) -> list[Row]:
    """The rows of the pass with the most places."""
    heaviest = max(passes, key=run.batches.slots, default=())
    return [run.batches.rows[row] for row in heaviest]


def resident_bytes(run: Run) -> dict[str, int]:
    """Bytes that lie on the card for the whole run, by name."""
    replica = run.replica
    adapters = replica.adapters
    states = [
        value
        for state in replica.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_cuda
    ]
    return {
        "base, as measured after loading": round(run.measured_gib.get("load", 0.0) * GIB),
        "adapters and gradients": adapters.flat.nbytes + adapters.grad.nbytes,
        "optimizer state": sum(value.nbytes for value in states),
    }


def _written(folder: Path, account: dict[str, Any]) -> bool:
    try:
        require_plain_folder(folder)
        make(folder)
        write_json(folder / f"rank{account['rank']}.json", account)
    except (OSError, NotPlain):  # the event says it all the same
        return False
    return True


def _gib(size: int) -> float:
    return round(size / GIB, 4)
