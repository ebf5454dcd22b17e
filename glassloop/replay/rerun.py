"""Updates of a run computed again, each compared with its record.

From the nearest earlier checkpoint, or from the beginning.

Whether an update was applied, and with which clip coefficient, is taken from its record, so that
skips and reactions of the run are repeated and not decided anew. Fresh adapters are a function of
the seed, so the beginning needs no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from glassloop.base.dropped import free_dropped
from glassloop.base.tokenizer import load_tokenizer
from glassloop.config import Config, as_dict
from glassloop.data.batches import Batches, Window
from glassloop.data.reading import read_dataset
from glassloop.data.rows import Row
from glassloop.data.stored import places_of
from glassloop.disk.opening import read_plain
from glassloop.plan.outlook import plan_of
from glassloop.plan.work import chooses_passes, pass_tokens_for
from glassloop.record.reading import Record, file_of, number, row_records
from glassloop.replay.replica import Parts, make_parts, state_of
from glassloop.replay.reproduce import Carried, Scene, carry_out, recorded_numbers, relative, step
from glassloop.saved.checkpoint import load_checkpoint, read_state
from glassloop.saved.resuming import read_plan
from glassloop.saved.run_state import RunState
from glassloop.saved.state import rng_state

Say = Callable[[str], None]  # takes a line for people
MOST_HALVINGS = 12


@dataclass(frozen=True)
class OnTheWay:
    """An update that was re-run on the way."""

    update: int
    loss_off: float  # relative difference from the record
    norm_off: float


def rerun(
    folder: Path,
    chain: Mapping[int, Record],
    config: Config,
    overrides: Mapping[str, str],
    say: Say,
    notes: list[str],
) -> tuple[Scene, tuple[OnTheWay, ...]]:
    """The scene of the last update of `chain`, and the updates re-run.

    Args:
        chain: records of one trajectory by number, see recorded.trajectory. overrides: fields that
            may differ from the checkpoint's config.

    Raises:
        ValueError: an update on the way is not on record, or rows, base or data are not those of
            the run.
    """
    update = max(chain)
    record = chain[update]
    if not record["supervised_tokens"]:
        raise ValueError(
            f"--update {update} has no supervised token and computed nothing: {record['reason']}"
        )
    ranks = len(record["rank_passes"])
    rows, pad_id, digest = load_rows(config)
    batches = _batches(folder, record, rows, config)
    lines = row_records(folder)
    of_rows = {u: lines.get((u, chain[u]["attempt"]), []) for u in chain}
    windows = {u: window_of(batches, chain[u], of_rows[u]) for u in chain}
    notes += _other_rows(folder, digest)
    parts = make_parts(config, None, pad_id=pad_id, rows=rows)
    done, rng_states, origin = _start(folder, chain, parts, ranks, overrides, notes)
    between = range(done + 1, update)
    if missing := [u for u in between if u not in chain]:
        raise ValueError(
            f"{folder} has no record of update {missing[0]}, which lies between {origin} "
            f"and update {update}"
        )
    way = f"; updates {done + 1} to {update - 1} are re-run on the way" if len(between) else ""
    say(f"from {origin}{way}")
    on_the_way = []
    for u in between:
        if not sum(chain[u]["rank_passes"]):
            continue  # left out, or nothing supervised: it moved nothing
        carried = _do_again(parts, rows, windows[u], chain[u], rng_states)
        rng_states = carried.rng_after
        on_the_way.append(_compared(carried, chain[u]))
        say(
            f"  update {u}: loss {carried.loss_nats:.6f}, gradient norm "
            f"{carried.grad_norm:.6f}; {_off(on_the_way[-1])}"
        )
    parts.replica.scale.value = number(record["loss_scale"]) or 1.0
    none = config.record.text == "none"
    scene = Scene(
        parts=parts,
        update=update,
        window=windows[update],
        rows=rows,
        row_names=tuple(f"row {index}" if none else row.row_id for index, row in enumerate(rows)),
        state=state_of(parts, rng_states),
        lr=record["lr"],
        max_grad_norm=config.optimizer.max_grad_norm,
        recorded={},
        origin=origin,
        updates_rerun=len(on_the_way),
    )
    return _with_record(scene, record, of_rows[update]), tuple(on_the_way)


def _batches(folder: Path, record: Record, rows: Sequence[Row], config: Config) -> Batches:
    """The run's windows and passes, packed as in the update."""
    planned = read_plan(folder, file_of(folder, record, "plan.json"))
    chosen = planned.get("pass_tokens") if chooses_passes(config) else None
    return Batches(
        rows,
        plan_of(config, len(rows), len(record["rank_passes"])),
        config.seed,
        config.execution.layout,
        chosen or pass_tokens_for(config, None, None),
        config.record.probe_every_updates,
    )


def _do_again(
    parts: Parts,
    rows: Sequence[Row],
    window: Window,
    record: Record,
    rng_states: tuple[dict[str, Any], ...],
) -> Carried:
    """Re-run an update on the way.

    It is applied, with its clip coefficient, if the run applied it.
    """
    parts.replica.scale.value = number(record["loss_scale"]) or 1.0
    parts.replica.optimizer.param_groups[0]["lr"] = record["lr"]
    carried = carry_out(parts, rows, window, record["supervised_tokens"], rng_states)
    if record["action"] == "applied":
        step(parts, 1.0 if record["clip_coef"] is None else record["clip_coef"])
    return carried


def _compared(carried: Carried, record: Record) -> OnTheWay:
    loss, norm = number(record["loss_nats"]), number(record["grad_norm_pre_clip"])
    assert loss is not None
    assert norm is not None
    return OnTheWay(
        record["update"], relative(carried.loss_nats, loss), relative(carried.grad_norm, norm)
    )


def _with_record(scene: Scene, record: Record, lines: list[Record]) -> Scene:
    """The scene with the numbers on record.

    Args:
        lines: the update's of rows.jsonl.
    """
    norms = record["rank_grad_norm"]
    numbers = recorded_numbers(
        scene,
        number(record["loss_nats"]),
        number(record["grad_norm_pre_clip"]),
        [number(value) for value in record["rank_loss_nats"]],
        None if norms is None else [float(value) for value in norms],
        [float(line["loss_sum_nats"]) for line in lines],
    )
    return replace(scene, recorded=numbers)


def _off(one: OnTheWay) -> str:
    worst = max(one.loss_off, one.norm_off)
    return "as recorded" if worst == 0 else f"off the record by {worst:.1e}"


def _start(
    folder: Path,
    chain: Mapping[int, Record],
    parts: Parts,
    ranks: int,
    overrides: Mapping[str, str],
    notes: list[str],
) -> tuple[int, tuple[dict[str, Any], ...], str]:
    """Restore the nearest earlier checkpoint into the parts.

    Returns updates done, each rank's random numbers, and the place's name.
    """
    update, base_hash = max(chain), parts.replica.plain_engine.report.base_hash
    for path, saved in _checkpoints(folder / "checkpoints", chain):
        if saved.base_hash != base_hash:
            raise ValueError(
                f"model.id = {parts.config.model.id} has changed, or is another base: "
                f"{path} was made on {saved.base_hash[:16]}, "
                f"this is {base_hash[:16]}; name the base that it was made on with --base"
            )
        if saved.update >= update:
            continue
        states = []
        try:
            for rank in range(ranks):
                load_checkpoint(
                    path,
                    adapters=parts.replica.adapters,
                    optimizer=parts.replica.optimizer,
                    rank=rank,
                    world_size=ranks,
                    base_hash=base_hash,
                    config=as_dict(parts.config),
                    allow_changed=tuple(overrides),
                )
                states.append(rng_state(parts.replica.device))
        except ValueError as error:
            notes.append(f"{error}; an earlier one is taken")
            continue
        return saved.update, tuple(states), f"checkpoint {path}"
    return (
        0,
        tuple(_first_rng(parts, ranks)),
        "the beginning (fresh adapters are a function of the seed)",
    )


def _checkpoints(folder: Path, chain: Mapping[int, Record]) -> Iterator[tuple[Path, RunState]]:
    """Readable checkpoints of the trajectory, the one after most updates first."""
    last = chain[max(chain)]["attempt"]
    known = []
    for path in folder.glob("update_*"):
        try:
            saved = read_state(path)
        except ValueError:
            continue
        lowest = chain[saved.update]["attempt"] if saved.update in chain else 0
        if lowest <= saved.attempt and (saved.attempt <= last or saved.update >= max(chain)):
            known.append((path, saved))
    return iter(sorted(known, key=lambda item: item[1].update, reverse=True))


def _first_rng(parts: Parts, ranks: int) -> Iterator[dict[str, Any]]:
    """Each rank's random numbers before update 1.

    A rank draws some while it builds its model, and dropout continues from there.
    """
    yield rng_state(parts.replica.device)
    for rank in range(1, ranks):
        if parts.config.lora.dropout > 0:
            make_parts(parts.config, None, pad_id=parts.replica.pad_id, rows=(), rank=rank)
            free_dropped(parts.replica.device)  # or every rank's model would lie beside the others
        yield rng_state(parts.replica.device)


def window_of(batches: Batches, record: Record, lines: list[Record]) -> Window:
    """The update's rows and passes as they were.

    From rows.jsonl, or from seed and layout if ids were not kept.

    Raises:
        ValueError: a row is not the one on record any more.
    """
    u = record["update"]
    cure = "replay it with the data and tokenizer as they were, or from its capsule"
    if lines:
        numbers = places_of(batches.rows)
        for line in lines:
            row = batches.rows[numbers[line["row_id"]]] if line["row_id"] in numbers else None
            was = line["real_tokens"], line["supervised_tokens"]
            now = None if row is None else (len(row), row.supervised_tokens)
            if now != was:
                is_now = "is not among the rows" if now is None else f"has {now[0]} and {now[1]}"
                raise ValueError(
                    f"the data have changed: row {line['row_id']} of update {u} had "
                    f"{was[0]} tokens, {was[1]} supervised, "
                    f"and now {is_now}: {cure}"
                )
        passes: list[list[list[int]]] = [
            [[] for _ in range(count)] for count in record["rank_passes"]
        ]
        for line in lines:
            of_rank = passes[line["rank"]]
            of_rank.extend([] for _ in range(line["micro_batch"] + 1 - len(of_rank)))
            of_rank[line["micro_batch"]].append(numbers[line["row_id"]])
        order = tuple(numbers[line["row_id"]] for line in lines)
        held = tuple(tuple(tuple(one) for one in rank) for rank in passes)
        # What ranks computed together, one rank computes whole here.
        return Window(u, record["epoch"], order, held, packed=batches.packed)
    window = _with_as_many_passes(batches, record)
    real = [sum(map(len, batches.share(window, rank))) for rank in range(len(window.passes))]
    counted = list(record["rank_real_tokens"])
    if window.split:  # ranks counted their parts of rows that all are rank 0's
        counted = [sum(counted), *(0 for _ in counted[1:])]
    if sum(record["rank_passes"]) and real != counted:
        raise ValueError(
            f"the data have changed: the ranks' rows of update {u} had "
            f"{counted} tokens, now {real}: {cure}"
        )
    return window


def _with_as_many_passes(batches: Batches, record: Record) -> Window:
    """The window in the record's number of passes.

    A run that ran out of memory continues in halves of its passes.
    """
    windows = [
        replace(batches, halvings=halvings).window(record["update"])
        for halvings in range(MOST_HALVINGS)
    ]
    return next(
        (w for w in windows if [len(passes) for passes in w.passes] == list(record["rank_passes"])),
        windows[0],
    )


def _other_rows(folder: Path, digest: str) -> list[str]:
    """A note where plan.json says that the run began with other rows."""
    try:
        saved = json.loads(read_plain(folder / "plan.json")).get("rows_digest", digest)
    except (OSError, ValueError, AttributeError):
        return []
    return (
        []
        if saved == digest
        else [
            f"the data have changed: {folder / 'plan.json'} has rows_digest {saved}, now "
            f"it is {digest}"
        ]
    )


def load_rows(config: Config) -> tuple[Sequence[Row], int, str]:
    """Training rows of the config's data, pad token id, and rows' digest."""
    tokenizer = load_tokenizer(config.model)
    dataset = read_dataset(config, lambda: tokenizer)
    return dataset.train.rows, cast(int, tokenizer.pad_token_id), dataset.digest
