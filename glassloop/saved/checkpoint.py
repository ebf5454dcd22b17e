"""A run on disk between two updates, whole or not at all.

    runs/<name>/checkpoints/
      best.json   # the checkpoint with the lowest held-out loss: pruning keeps it
      update_000060/
        adapter_model.safetensors     # fp32 LoRA matrices under PEFT's names; no base weights
        adapter_config.json           # and the tokenizer's files, chat_template.jinja among them
        optimizer.safetensors  optimizer.json
        rng_rank0.json ...            # one a rank
        state.json                    # RunState
        SHA256SUMS                    # of all files above

Rank 0 saves, every rank loads. Older checkpoints are removed once a new one is published and
synced. Safetensors and JSON only; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from glassloop.disk import publish as folders
from glassloop.disk.publish import REPLACED
from glassloop.disk.publish import NotSaved as CheckpointNotSaved
from glassloop.formula.optim import FlatAdapters
from glassloop.saved import state as snapshots
from glassloop.saved.changes import check_same_math
from glassloop.saved.run_state import SCHEMA, STATE, RunState, parsed, state_from
from glassloop.saved.state import rng_state, saved_name

__all__ = ["CheckpointNotSaved", "Saved", "best_checkpoint", "last_checkpoint"]
__all__ += ["load_checkpoint", "read_state", "rng_state", "save_checkpoint", "saved_name"]

ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"
REQUIRED = (ADAPTER, "adapter_config.json", OPTIMIZER, "optimizer.json", STATE)
LIMIT = "checkpoint.keep"  # the config field that says how many are kept
PUBLISHED = re.compile(rf"update_\d{{6,}}({re.escape(REPLACED)})?")


@dataclass(frozen=True)
class Saved:
    """The result of a save."""

    path: Path
    best: Path | None  # the run's best by held-out loss; None if none was measured
    removed: tuple[Path, ...]
    notes: tuple[str, ...]  # what could not be tidied up after publication


def save_checkpoint(
    folder: Path,
    state: RunState,
    *,
    adapters: FlatAdapters,
    peft_model: Any,
    tokenizer: Any,
    chat_template: str,
    base_id: str,
    base_revision: str | None,
    optimizer: torch.optim.Optimizer,
    rng_states: Sequence[dict[str, Any]],
    keep: int,
) -> Saved:
    """Publish `folder`/update_NNNNNN, then remove older checkpoints.

    The `keep` newest stay, and the best by held-out loss.

    Args:
        folder: runs/<name>/checkpoints; made where it does not exist.
        peft_model: its adapter "default" is described in adapter_config.json.
        base_id: hub id of the base, written there; `base_revision` is its commit.
        chat_template: saved as the tokenizer's; the tokenizer itself keeps the one it has.
        rng_states: rng_state() of every rank, in rank order.

    Raises:
        CheckpointNotSaved: names the folder, what the disk said, and the cure. Nothing was
            published and nothing was removed.
    """
    assert len(rng_states) == state.world_size, (
        f"{len(rng_states)} states of random numbers for {state.world_size} ranks"
    )
    if state.heldout_loss_nats is not None and not math.isfinite(state.heldout_loss_nats):
        state = dataclasses.replace(state, heldout_loss_nats=None)
    state = dataclasses.replace(
        state, serial=1 + max((other.serial for other in _newest_first(folder).values()), default=0)
    )
    matrices = snapshots.adapter_matrices(adapters)
    described = peft_model.peft_config["default"].to_dict()
    described |= {
        "base_model_name_or_path": base_id,
        "revision": base_revision,
        "inference_mode": True,
    }
    tensors, values = snapshots.optimizer_state(optimizer, adapters.flat)
    contents = {
        ADAPTER: safetensors.torch.save(matrices, metadata={"format": "pt"}),
        "adapter_config.json": _json(described),
        OPTIMIZER: safetensors.torch.save(tensors),
        "optimizer.json": _json(values),
        **{f"rng_rank{rank}.json": _json(rng) for rank, rng in enumerate(rng_states)},
        STATE: _json(dataclasses.asdict(state)),
    }
    target = folder / f"update_{state.update:06d}"
    folders.publish(
        target,
        contents,
        limit=LIMIT,
        also=lambda work: _save_tokenizer(work, tokenizer, chat_template),
    )
    return _tidy(folder, target, keep)


def _json(value: Any) -> bytes:
    """Sets (PEFT has some) become sorted lists."""
    return (
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=sorted) + "\n"
    ).encode()


def _save_tokenizer(work: Path, tokenizer: Any, chat_template: str) -> None:
    before, tokenizer.chat_template = tokenizer.chat_template, chat_template
    try:
        tokenizer.save_pretrained(work)
    except Exception as error:
        # The library tokenizers raises a plain Exception where the disk refuses.
        found = re.search(r"os error (\d+)", str(error))
        if isinstance(error, OSError) or found is None:
            raise
        raise OSError(int(found[1]), str(error)) from error
    finally:
        tokenizer.chat_template = before


def _tidy(folder: Path, published: Path, keep: int) -> Saved:
    """Note the best, then remove older checkpoints and dead processes' leavings."""
    known = _newest_first(folder)
    best = _best(known)
    kept = {published, best, *_current(known)[:keep]}
    removed: list[Path] = []
    notes: tuple[str, ...] = ()
    try:
        if best is not None:
            pointer = {"schema": SCHEMA, "folder": best.name, "update": known[best].update}
            folders.replace_file(
                folder / "best.json",
                _json(pointer | {"heldout_loss_nats": known[best].heldout_loss_nats}),
            )
        for path in [path for path in known if path not in kept]:
            folders.remove(path)
            removed.append(path)
        folders.sweep(folder)
    except OSError as error:
        notes = (
            f"{published} is saved, but {folder} could not be tidied: {error}; "
            f"{folders.cure(error, LIMIT)}",
        )
    return Saved(published, best, tuple(removed), notes)


def last_checkpoint(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest complete checkpoint of a run, None if there is none.

    With a note for each one that is not complete.
    """
    folder = run / "checkpoints"
    known = _newest_first(folder)
    notes = [f"{path} was never finished: ignored" for path in folders.unfinished(folder)]
    unknown = [
        path
        for path in sorted(folder.glob("update_*"))
        if PUBLISHED.fullmatch(path.name) and path not in known
    ]
    for path in [*unknown, *known]:
        try:
            state_from(folders.read(path, REQUIRED))
        except ValueError as error:
            notes.append(f"{path} is not whole: {error}: ignored")
        else:
            return path, tuple(notes)
    return None, tuple(notes)


def read_state(path: Path) -> RunState:
    """Read a checkpoint's state, without its other files.

    Raises ValueError naming the file at fault.
    """
    return state_from(folders.read(path, REQUIRED, only=STATE))


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, of equals the newest.

    None if no loss was measured. best.json names it.
    """
    return _best(_newest_first(run / "checkpoints"))


def _newest_first(folder: Path) -> dict[Path, RunState]:
    """Published checkpoints with a readable state, the last one saved first.

    Their other files are not read.
    """
    known = {}
    for path in folder.glob("update_*"):
        if PUBLISHED.fullmatch(path.name):
            try:
                known[path] = read_state(path)
            except ValueError:
                continue  # last_checkpoint names it
    return {
        path: known[path]
        for path in sorted(known, key=lambda path: known[path].serial, reverse=True)
    }


def _current(known: dict[Path, RunState]) -> list[Path]:
    """Without those that were replaced."""
    return [path for path in known if path.suffix != REPLACED or path.with_suffix("") not in known]


def _best(known: dict[Path, RunState]) -> Path | None:
    losses = {
        path: loss
        for path in _current(known)
        if (loss := known[path].heldout_loss_nats) is not None
    }
    return min(losses, key=lambda path: losses[path], default=None)


def load_checkpoint(
    path: Path,
    *,
    adapters: FlatAdapters,
    optimizer: torch.optim.Optimizer,
    rank: int,
    world_size: int,
    base_hash: str,
    config: dict[str, Any],
    allow_changed: Collection[str] = (),
    reshape: bool = False,
) -> RunState:
    """Restore adapters, optimizer and this rank's random numbers.

    Everything is checked before anything changes.

    Call it on every rank, and last: what draws random numbers between it and the next update makes
        that update another one.

    Args:
        config: the resumed run's whole config in plain JSON types; fields that say what an update
            computes must be as they were.
        allow_changed: such fields that may differ all the same ("schedule.updates"), because the
            caller has said what that does.
        reshape: another number of ranks may have saved it. Ranks that it does not know keep their
            random numbers.

    Raises:
        ValueError: a file is missing, corrupt or malformed, or ranks, base, config, adapters or
            optimizer are other ones. Names the checkpoint, the rank, the file or field, and both
            values. Nothing was changed.
    """
    try:
        contents = folders.read(path, REQUIRED)
        state = state_from(contents)
        _check_same_run(
            state,
            path,
            state.world_size if reshape else world_size,
            base_hash,
            config,
            allow_changed,
        )
        if (
            missing := {f"rng_rank{other}.json" for other in range(state.world_size)}
            - contents.keys()
        ):
            raise ValueError(
                f"{folders.SUMS} is corrupt: it does not list {', '.join(sorted(missing))}"
            )
        device = adapters.flat.device
        known = rank if rank < state.world_size else 0
        rng = parsed(
            contents,
            f"rng_rank{known}.json",
            lambda data: snapshots.checked_rng(json.loads(data), device),
        )
        flat = parsed(
            contents,
            ADAPTER,
            lambda data: snapshots.flat_from(safetensors.torch.load(data), adapters),
        )
        tensors, plain = (
            parsed(contents, OPTIMIZER, safetensors.torch.load),
            parsed(contents, "optimizer.json", json.loads),
        )
        moments = snapshots.built_optimizer_state(optimizer, adapters.flat, tensors, plain)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} cannot be restored on rank {rank}: {error}") from error
    with torch.no_grad():
        adapters.flat.copy_(flat)
    snapshots.set_optimizer_state(optimizer, adapters.flat, moments)
    if known == rank:
        snapshots.set_rng(rng, device)
    return state


def _check_same_run(
    state: RunState,
    path: Path,
    world_size: int,
    base_hash: str,
    config: dict[str, Any],
    allow_changed: Collection[str],
) -> None:
    if state.world_size != world_size:
        cure = (
            f"start {state.world_size} (accelerate launch --num_processes "
            f"{state.world_size}), or resume with {world_size}: --resume.reshape"
        )
        raise ValueError(
            f"it was saved by {state.world_size} ranks, this run has {world_size}: {cure}"
        )
    if state.base_hash != base_hash:
        cure = "set model.id, model.revision and model.quantization to those of the saved run"
        raise ValueError(
            f"it was made on the base {state.base_hash}, this run has the base {base_hash}: {cure}"
        )
    kept = f"begin a new run from these adapters with model.init_adapter={path}"
    check_same_math(state.config, config, allow_changed, f"leave it as it was, or {kept}")
