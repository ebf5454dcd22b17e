"""A run kept on disk between two updates: saved whole or not at all, restored whole or not at all.

    runs/<name>/checkpoints/
      best.json                       # names the checkpoint with the lowest held-out loss, which pruning never removes
      update_000060/
        adapter_model.safetensors     # fp32 LoRA matrices under PEFT's names; no base weights
        adapter_config.json           # and the tokenizer's files, chat_template.jinja among them
        optimizer.safetensors  optimizer.json
        rng_rank0.json ...            # one a rank
        state.json                    # State
        SHA256SUMS                    # of all files above

Rank 0 saves, every rank loads. Older checkpoints are removed once a new one is published and synced. Safetensors and JSON only;
nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from glassloop.config.config import Config, as_dict
from glassloop.disk import publish as folders
from glassloop.disk.publish import REPLACED
from glassloop.disk.publish import NotSaved as CheckpointNotSaved
from glassloop.formula.optim import FlatAdapters
from glassloop.saved import state as snapshots
from glassloop.saved.state import rng_state, saved_name

__all__ = [
    "CheckpointNotSaved",
    "Saved",
    "State",
    "best_checkpoint",
    "config_changes",
    "last_checkpoint",
    "load_checkpoint",
    "read_state",
]
__all__ += ["rng_state", "save_checkpoint", "saved_name"]

SCHEMA = 1  # raised when a field changes its meaning; older ones open
ADAPTER, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"
REQUIRED = (ADAPTER, "adapter_config.json", OPTIMIZER, "optimizer.json", STATE)
LIMIT = "checkpoint.keep"  # the config field that says how many are kept
PUBLISHED = re.compile(rf"update_\d{{6,}}({re.escape(REPLACED)})?")
MATH = (
    "seed",
    "model",
    "lora",
    "data",
    "batch",
    "schedule",
    "optimizer",
)  # parts of a config that say what an update computes
FREE = (
    "model.cache_dir",
    "model.init_adapter",
    "model.trust_remote_code",
    "batch.ranks",
)  # fields in them that do not


@dataclass(frozen=True)
class State:
    """Where a run stands between two updates, in plain JSON types."""

    update: int  # windows that are done, skipped ones included; the next one is update + 1
    epoch: int  # 0-based pass over the rows that the last window belonged to
    world_size: int
    base_hash: str  # of the frozen base's bytes; another base is refused
    config: dict[str, Any]  # the whole config
    versions: dict[str, str] = field(default_factory=dict)  # package -> version
    attempt: int = 1  # of the updates that this process does, as in their records
    loss_scale: float = 1.0  # fp16: factor on the next update's loss
    finite_updates: int = 0  # fp16: finite updates in a row since the factor last changed
    heldout_loss_nats: float | None = (
        None  # of these very weights, token mean; None where not measured or not finite
    )
    tracker_ids: dict[str, str] = field(default_factory=dict)  # tracker -> id of its run
    details: dict[str, Any] = field(
        default_factory=dict
    )  # what other parts keep: detector windows, passes, memory tiers
    serial: int = 0  # given by save_checkpoint: one more than any other in the folder has, so the last one saved is the newest
    schema: int = SCHEMA


@dataclass(frozen=True)
class Saved:
    """What a save did."""

    path: Path
    best: Path | None  # the run's best by held-out loss; None where none was measured
    removed: tuple[Path, ...]
    notes: tuple[str, ...]  # what could not be tidied up after publication


def save_checkpoint(
    folder: Path,
    state: State,
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
    """Publish `folder`/update_NNNNNN, then remove older checkpoints but for the `keep` newest and the best by held-out loss.

    Args:
        folder: runs/<name>/checkpoints; made where it does not exist.
        peft_model: its adapter "default" is described in adapter_config.json.
        base_id: hub id of the base, written there; `base_revision` is its commit.
        chat_template: saved as the tokenizer's; the tokenizer itself keeps the one it has.
        rng_states: rng_state() of every rank, in rank order.

    Raises:
        CheckpointNotSaved: names the folder, what the disk said, and the cure. Nothing was published and nothing was removed.
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
        found = re.search(
            r"os error (\d+)", str(error)
        )  # the library tokenizers raises a plain Exception where the disk refuses
        if isinstance(error, OSError) or found is None:
            raise
        raise OSError(int(found[1]), str(error)) from error
    finally:
        tokenizer.chat_template = before


def _tidy(folder: Path, published: Path, keep: int) -> Saved:
    """Note the best, then remove what is neither new nor best, and what dead processes left."""
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
            f"{published} is saved, but {folder} could not be tidied: {error}; {folders.cure(error, LIMIT)}",
        )
    return Saved(published, best, tuple(removed), notes)


def last_checkpoint(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest complete checkpoint in a run's folder, None where there is none; and a note for each one passed over."""
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
            _state(folders.read(path, REQUIRED))
        except ValueError as error:
            notes.append(f"{path} is not whole: {error}: ignored")
        else:
            return path, tuple(notes)
    return None, tuple(notes)


def read_state(path: Path) -> State:
    """Where a checkpoint stands; its other files are not looked at. Raises ValueError naming the file at fault."""
    return _state(folders.read(path, REQUIRED, only=STATE))


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, of equals the newest; None where none was measured. best.json names it."""
    return _best(_newest_first(run / "checkpoints"))


def _newest_first(folder: Path) -> dict[Path, State]:
    """Published checkpoints whose state can be read, the last one saved first; their other files are not looked at."""
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


def _current(known: dict[Path, State]) -> list[Path]:
    """Without those that were replaced."""
    return [path for path in known if path.suffix != REPLACED or path.with_suffix("") not in known]


def _best(known: dict[Path, State]) -> Path | None:
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
) -> State:
    """Restore adapters, optimizer and this rank's random numbers. Everything is checked before anything is changed.

    Call it on every rank, and last: what draws random numbers between it and the next update makes that update another one.

    Args:
        config: the resumed run's whole config in plain JSON types; fields that say what an update computes must be as they were.
        allow_changed: such fields that may differ all the same ("schedule.updates"), because the caller has said what that does.
        reshape: another number of ranks may have saved it. Ranks that it does not know keep their random numbers.

    Raises:
        ValueError: a file is missing, corrupt or malformed, or ranks, base, config, adapters or optimizer are other ones.
            Names the checkpoint, the rank, the file or field, and both values. Nothing was changed.
    """
    try:
        contents = folders.read(path, REQUIRED)
        state = _state(contents)
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
        rng = _parsed(
            contents,
            f"rng_rank{known}.json",
            lambda data: snapshots.checked_rng(json.loads(data), device),
        )
        flat = _parsed(
            contents,
            ADAPTER,
            lambda data: snapshots.flat_from(safetensors.torch.load(data), adapters),
        )
        tensors, plain = (
            _parsed(contents, OPTIMIZER, safetensors.torch.load),
            _parsed(contents, "optimizer.json", json.loads),
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


def config_changes(saved: dict[str, Any], present: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields ("lora.r") whose values differ, with both; a field that one side lacks is None there."""

    def leaves(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: list(tree) if isinstance(tree, tuple) else tree}
        return {
            k: leaf
            for key, branch in tree.items()
            for k, leaf in leaves(branch, f"{name}.{key}".lstrip(".")).items()
        }

    old, new = leaves(saved), leaves(present)
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }


def _check_same_run(
    state: State,
    path: Path,
    world_size: int,
    base_hash: str,
    config: dict[str, Any],
    allow_changed: Collection[str],
) -> None:
    if state.world_size != world_size:
        cure = f"start {state.world_size} (accelerate launch --num_processes {state.world_size}), or go on with {world_size}: --resume.reshape"
        raise ValueError(
            f"it was saved by {state.world_size} ranks, this run has {world_size}: {cure}"
        )
    if state.base_hash != base_hash:
        cure = "set model.id, model.revision and model.quantization to those of the saved run"
        raise ValueError(
            f"it was made on the base {state.base_hash}, this run has the base {base_hash}: {cure}"
        )
    wrong = [
        f"{name} was {old!r} and now is {new!r}"
        for name, (old, new) in config_changes(state.config, config).items()
        if name.partition(".")[0] in MATH
        and name not in FREE
        and name not in allow_changed
        and not _is_newer(name, new, state.config)
    ]
    if wrong:
        cure = f"leave it as it was, or begin a new run from these adapters with model.init_adapter={path}"
        raise ValueError(f"{'; '.join(wrong)}: {cure}")


def _is_newer(name: str, value: Any, saved: dict[str, Any]) -> bool:
    """Whether the version that saved did not know the field, and it has its default now."""
    known: Any = saved
    default: Any = as_dict(Config())
    lacking = False
    for part in name.split("."):
        if not isinstance(default, dict) or part not in default:
            return False
        default = default[part]
        lacking = lacking or not isinstance(known, dict) or part not in known
        known = None if lacking else known[part]
    return lacking and value == default


def _parsed(contents: dict[str, bytes], name: str, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(contents[name])
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{name} does not fit: {error}") from error


def _state(contents: dict[str, bytes]) -> State:
    """The state in its file; raises ValueError naming the field that is missing, unknown or of a wrong type."""
    plain = _parsed(contents, STATE, json.loads)
    if not isinstance(plain, dict) or not isinstance(plain.get("schema"), int):
        raise ValueError(f"{STATE} is malformed: it says no schema")
    if plain["schema"] > SCHEMA:
        raise ValueError(
            f"{STATE} has schema {plain['schema']} and this glassloop reads up to {SCHEMA}: install a newer one"
        )
    plain.pop("order_seed", None)  # older checkpoints have it; config["seed"] says the same
    fields = {f.name: f for f in dataclasses.fields(State)}
    needed = {
        name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING
    }
    if odd := (needed - plain.keys()) | (plain.keys() - fields.keys()):
        raise ValueError(f"{STATE} is malformed: missing or unknown: {', '.join(sorted(odd))}")
    kinds = {"int": int, "float": (int, float), "str": str, "dict": dict}
    for name, value in plain.items():
        kind, _, rest = str(fields[name].type).partition(" ")
        if not isinstance(value, kinds[kind.partition("[")[0]]) and not (
            value is None and rest == "| None"
        ):
            raise ValueError(f"{STATE} is malformed: {name} is {value!r}")
    return State(**plain)
