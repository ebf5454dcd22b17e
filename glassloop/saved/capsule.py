"""An update kept whole, to run again without the run's data.

    runs/<name>/capsules/
      update_000037/
        adapter_before.safetensors    # fp32 LoRA matrices under PEFT's names, before the update
        optimizer.safetensors  optimizer.json
        rng_rank0.json ...            # one a rank, before its passes
        capsule.json        # CapsuleFacts: rows, passes, lr, scale, config, versions, results
        SHA256SUMS                    # of all files above

Rank 0 saves, after the gate and before the optimizer moves. Published by rename like a checkpoint;
safetensors and JSON only, nothing is pickled. Under record.text = none neither ids nor tokens of
rows are written: such a capsule needs the data to be replayed, and knows by a digest whether a row
still is the one it was.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from glassloop.disk import publish as folders
from glassloop.disk.environment import PACKAGES, package_version
from glassloop.disk.publish import NotSaved as CapsuleNotSaved
from glassloop.formula.optim import FlatAdapters
from glassloop.saved import state as snapshots
from glassloop.saved.capsule_facts import (
    CapsuleFacts,
    Expected,
    facts_from,
    from_json,
    plain_facts,
    row_digest,
    to_json,
)
from glassloop.saved.state import adapter_matrices, flat_from

__all__ = ["Capsule", "CapsuleFacts", "CapsuleNotSaved", "CapsuleSaved", "Expected"]
__all__ += [
    "find_capsules",
    "read_capsule",
    "read_facts",
    "restore_capsule",
    "row_digest",
    "save_capsule",
    "versions",
]

ADAPTER, OPTIMIZER, FACTS = "adapter_before.safetensors", "optimizer.safetensors", "capsule.json"
REQUIRED = (ADAPTER, OPTIMIZER, "optimizer.json", FACTS)
LIMIT = "record.capsules"  # the config field that says how many are kept
PUBLISHED = re.compile(r"update_\d{6,}")


@dataclass(frozen=True)
class Capsule:
    """A capsule in memory, every file checked against its sum."""

    path: Path
    facts: CapsuleFacts
    matrices: dict[str, Tensor]  # fp32, under PEFT's names
    moments: tuple[dict[str, Tensor], Any]  # optimizer state: tensors, plain values
    rng_states: tuple[dict[str, Any], ...]  # by rank


@dataclass(frozen=True)
class CapsuleSaved:
    """The result of a save.

    `path` is None if the caps on number and size left no room; then `note` says so.
    """

    path: Path | None
    removed: tuple[Path, ...] = ()
    note: str | None = None


def versions(device: torch.device) -> dict[str, str]:
    """Versions, device and threads: they decide an update's last bits."""
    found = {name: package_version(name) or "none" for name in PACKAGES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {**found, "device": name, "threads": str(torch.get_num_threads())}


def save_capsule(
    folder: Path,
    facts: CapsuleFacts,
    *,
    text: str,
    adapters: FlatAdapters,
    optimizer: torch.optim.Optimizer,
    rng_states: Sequence[dict[str, Any]],
    keep: int,
    most_gib: float,
) -> CapsuleSaved:
    """Publish `folder`/update_NNNNNN, then remove what the caps no longer leave room for.

    Room goes first to the newest bad update, then to the newest healthy one, to those asked for, to
    older bad ones, to older healthy ones; of equals to the newest. One that would have none is not
    written.

    Args:
        folder: runs/<name>/capsules; made where it does not exist.
        text: record.text; none keeps ids and tokens of rows out of the capsule.
        adapters, optimizer: as they were before the update.
        rng_states: rng_state() of every rank before its passes, in rank order.
        keep: most capsules in the folder. most_gib: most space of all together, GiB.

    Raises:
        CapsuleNotSaved: names the folder, what the disk said, and the cure. Nothing was published
            and nothing was removed.
    """
    assert len(rng_states) == facts.world_size == len(facts.passes), (
        f"{len(rng_states)} states for {facts.world_size} ranks"
    )
    known = {
        path: other for path in find_capsules(folder) if (other := _facts_or_none(path)) is not None
    }
    serial = 1 + max((other.serial for other in known.values()), default=0)
    digests = {number: row_digest(row) for number, row in facts.rows.items()}
    facts = dataclasses.replace(facts, digests=digests, serial=serial)
    tensors, values = snapshots.optimizer_state(optimizer, adapters.flat)
    contents = {
        ADAPTER: safetensors.torch.save(adapter_matrices(adapters)),
        OPTIMIZER: safetensors.torch.save(tensors),
        "optimizer.json": to_json(values),
        **{f"rng_rank{rank}.json": to_json(state) for rank, state in enumerate(rng_states)},
        FACTS: to_json(plain_facts(facts, text)),
    }
    target = folder / f"update_{facts.update:06d}"
    known.pop(target, None)  # the update was done before: the new one takes its place
    sizes = {path: _size(path) for path in known} | {target: sum(map(len, contents.values()))}
    kept = _with_room({**known, target: facts}, sizes, keep, most_gib)
    if target not in kept:
        others = ", ".join(path.name for path in kept) or "none"
        return CapsuleSaved(
            None,
            note=f"update {facts.update} ({facts.why}, {sizes[target] / 2**30:.2f} GiB) was not "
            f"kept: record.capsules = {keep} and "
            f"record.capsules_gib = {most_gib:g} leave no room beside {others}; raise "
            f"them, or remove capsules from {folder}",
        )
    folders.publish(target, contents, limit=LIMIT)
    removed = [path for path in known if path not in kept]
    try:
        for path in (*removed, *folder.glob(f"update_*{folders.REPLACED}")):
            folders.remove(path)
        folders.sweep(folder)
    except OSError as error:
        return CapsuleSaved(
            target,
            note=f"{target} is kept, but {folder} could not be tidied: {error}; "
            f"{folders.cure(error, LIMIT)}",
        )
    return CapsuleSaved(target, tuple(removed))


def _with_room(
    known: Mapping[Path, CapsuleFacts], sizes: Mapping[Path, int], keep: int, most_gib: float
) -> list[Path]:
    """The capsules that stay, in the order of their claim.

    As many as number and size allow.
    """
    newest_first = sorted(known, key=lambda path: known[path].serial, reverse=True)
    bad, healthy = (
        [p for p in newest_first if test(known[p])]
        for test in (lambda f: f.bad, lambda f: f.why == "healthy")
    )
    asked = [path for path in newest_first if known[path].why == "asked"]
    kept: list[Path] = []
    room = most_gib * 2**30
    for path in (*bad[:1], *healthy[:1], *asked, *bad[1:], *healthy[1:]):
        if len(kept) < keep and sizes[path] <= room:
            kept.append(path)
            room -= sizes[path]
    return kept


def find_capsules(folder: Path) -> list[Path]:
    """Published capsules of a run's capsules folder, by name.

    Their files are not read.
    """
    return sorted(
        path for path in folder.glob("update_*") if PUBLISHED.fullmatch(path.name) and path.is_dir()
    )


def read_facts(path: Path) -> CapsuleFacts:
    """Read the facts of a capsule, without its tensors.

    Raises ValueError naming the capsule and the file or field at fault.
    """
    try:
        return facts_from(folders.read(path, REQUIRED, only=FACTS)[FACTS], FACTS)
    except ValueError as error:
        raise ValueError(
            f"capsule {path} cannot be read: {error}. Take another capsule, or an undamaged copy"
        ) from error


def read_capsule(path: Path) -> Capsule:
    """Read a whole capsule.

    Raises ValueError naming the capsule and the file or field at fault.
    """
    try:
        contents = folders.read(path, REQUIRED)
        facts = facts_from(contents[FACTS], FACTS)
        if (
            missing := {f"rng_rank{rank}.json" for rank in range(facts.world_size)}
            - contents.keys()
        ):
            raise ValueError(f"{folders.SUMS} does not list {', '.join(sorted(missing))}")
        matrices, tensors = (_parsed(contents, name) for name in (ADAPTER, OPTIMIZER))
        states = tuple(
            _parsed(contents, f"rng_rank{rank}.json") for rank in range(facts.world_size)
        )
        return Capsule(
            path, facts, matrices, (tensors, _parsed(contents, "optimizer.json")), states
        )
    except ValueError as error:
        raise ValueError(
            f"capsule {path} cannot be read: {error}. Take another capsule, or an undamaged copy"
        ) from error


def restore_capsule(
    capsule: Capsule, *, adapters: FlatAdapters, optimizer: torch.optim.Optimizer
) -> None:
    """Set adapters and optimizer to their state before the update.

    Everything is checked before anything changes.

    Raises ValueError naming the capsule and the matrix or field that does not fit. Random numbers
    are each rank's own: see rng_states.
    """
    try:
        flat = flat_from(capsule.matrices, adapters)
        moments = snapshots.built_optimizer_state(optimizer, adapters.flat, *capsule.moments)
    except ValueError as error:
        cure = "build the model and optimizer that capsule.json's config asks for"
        raise ValueError(
            f"capsule {capsule.path} does not fit this model: {error}; {cure}"
        ) from error
    with torch.no_grad():
        adapters.flat.copy_(flat)
    snapshots.set_optimizer_state(optimizer, adapters.flat, moments)


def _facts_or_none(path: Path) -> CapsuleFacts | None:
    try:
        return read_facts(path)
    except ValueError:
        return None  # a damaged one is not ours to remove; whoever reads it is told


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _parsed(contents: dict[str, bytes], name: str) -> Any:
    """A file's tensors or JSON value; raises ValueError naming the file."""
    if not name.endswith(".safetensors"):
        return from_json(contents[name], name)
    try:
        return safetensors.torch.load(contents[name])
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{name} is malformed: {error}") from error
