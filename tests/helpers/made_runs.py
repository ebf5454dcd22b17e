"""Write folders of runs that never ran.

Faults lie at known updates.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

from glassloop.disk.publish import write_json, write_text
from glassloop.health import machine as health_machine
from glassloop.health.machine import Machine
from glassloop.record.observers import JsonlObserver, TextPolicy
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

SPIKE, BROKEN, REDONE, SLOW = 24, 31, 12, 36
# The loss leaps; the loss is not a number and nothing is applied; done twice, after a resume; a
# card was throttled.
EVIL = (
    "</script><script>window.hacked = 1</script>"
    "<img src=x onerror='window.hacked = 2'><b>&amp; bold</b>"
)
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def matrices(layers: int) -> tuple[str, ...]:
    """Short names of a model's adapter matrices."""
    parts = [f"{'self_attn' if p in 'qkvo' else 'mlp'}.{p}_proj" for p in PROJECTIONS]
    return tuple(
        f"layers.{layer}.{part}.{side}"
        for layer in range(layers)
        for part in parts
        for side in "AB"
    )


def update_record(
    update: int,
    updates: int,
    ranks: int = 2,
    *,
    drawn: random.Random,
    lr: float = 2e-4,
    level: float = 1.0,
) -> UpdateRecord:
    """A sound update whose loss falls; `level` multiplies loss and norm."""
    loss = level * (1.5 + 2 * math.exp(-3 * update / updates) + 0.05 * drawn.gauss(0, 1))
    norm = level * 0.5 * math.exp(0.1 * drawn.gauss(0, 1))
    return UpdateRecord(
        update=update,
        updates=updates,
        epoch=(update - 1) // max(1, updates // 4),
        rows=4 * ranks,
        lr=lr * min(update / 3, 1.0),
        loss_nats=loss,
        grad_norm_pre_clip=norm,
        clip_coef=min(1.0, 1.0 / norm),
        action="applied",
        reason=None,
        supervised_tokens=100 * ranks,
        rank_loss_nats=tuple(loss * (1 + 0.02 * rank) for rank in range(ranks)),
        rank_supervised_tokens=(100,) * ranks,
        rank_real_tokens=tuple(400 + 10 * rank for rank in range(ranks)),
        rank_slot_tokens=(512,) * ranks,
        rank_passes=(2,) * ranks,
        rank_grad_norm=tuple(norm * (0.7 + 0.1 * rank) for rank in range(ranks)),
        rank_cosine=0.4 if ranks > 1 else None,
        loss_scale=None,
        update_s=2.0,
        compute_s=1.6,
        reduce_s=0.2,
        rank_peak_gib=None,
        optimizer_s=0.1,
        rank_passes_s=tuple(1.0 + 0.5 * rank / ranks for rank in range(ranks)),
        noise_scale_tokens=None if update < 5 else 900.0 + update,
    )


def machine_record(update: int, ranks: int, *, slow: str | None) -> MachineRecord:
    """Readings of cards that tell everything; a slow one is throttled."""
    calm = Machine(
        sm_clock_mhz=1700.0 + update % 3, memory_clock_mhz=2600.0, power_w=600.0 + update % 5,
        temperature_c=60.0 + update / 10, throttle=4.0, card_busy=0.97, host_gib=4.0,
        page_faults=900.0, disk_faults=0.0, cpu_s=2.0, preempted=3.0, processor_wait_s=0.01,
    )  # fmt: skip
    hot = dataclasses.replace(calm, sm_clock_mhz=900.0, throttle=32.0, temperature_c=88.0)
    last = calm if slow is None else hot
    numbers = [calm.numbers()] * (ranks - 1) + [last.numbers()]
    record = health_machine.machine_record(update, 1, numbers)
    assert record is not None
    return dataclasses.replace(record, slow=slow)


def probe_record(update: int, names: tuple[str, ...], *, drawn: random.Random) -> ProbeRecord:
    """Make norms of every matrix.

    In update 1 B is 0, so A has no gradient and B no ratio.
    """
    fresh = update == 1
    grads = tuple(
        0.0 if fresh and name.endswith("A") else math.exp(drawn.gauss(-3, 1)) for name in names
    )
    weights = tuple(0.0 if fresh and name.endswith("B") else 1 + drawn.random() for name in names)
    steps = tuple(0.001 * (1 + drawn.random()) for _ in names)
    return ProbeRecord(
        update=update,
        applied=True,
        matrices=names,
        grad_norm=grads,
        weight_norm=weights,
        update_norm=steps,
        update_to_weight=tuple(s / w if w else None for s, w in zip(steps, weights, strict=True)),
        unmoved_share=tuple(0.0 for _ in names),
        modules=tuple(name[:-2] for name in names[::2]),
        delta_norm=steps[::2],
        all_update_to_weight=0.001,
        all_unmoved_share=0.0,
    )


def rows_of(
    record: UpdateRecord, rows: int, *, drawn: random.Random, last: str = ""
) -> tuple[RowRecord, ...]:
    """Two micro-batches of two rows on each rank."""
    made = []
    for rank in range(len(record.rank_passes)):
        for place in range(4):
            loss = (record.loss_nats or 0.0) * 25 * (1 + 0.1 * drawn.random())
            row_id = f"train:{(record.update * 8 + rank * 4 + place) % rows}"
            real = 128 if place % 2 else 72 + (10 * rank if place == 0 else 0)
            made.append(
                RowRecord(record.update, rank, place // 2, row_id, loss, 25, real, record.attempt)
            )
    if last:
        made[-1] = dataclasses.replace(
            made[-1], row_id=last, loss_sum_nats=made[-1].loss_sum_nats * 6
        )
    return tuple(made)


def write_run(
    folder: Path,
    *,
    updates: int = 40,
    ranks: int = 2,
    layers: int = 2,
    seed: int = 1,
    lr: float = 2e-4,
    probe_every: int = 2,
    text: TextPolicy = "full",
    faults: bool = True,
    end: str | None = "finished",
    rows: int = 60,
    raised: tuple[int, float] = (1, 0.0),
) -> Path:
    """Write a run's folder.

    Args:
        raised: (update, nats): what is added to losses from that update on.
        faults: plant SPIKE, BROKEN, REDONE and SLOW.
    """
    folder.mkdir(parents=True)
    drawn = random.Random(seed)
    records = [update_record(u, updates, ranks, drawn=drawn, lr=lr) for u in range(1, updates + 1)]
    first, offset = raised
    if offset:
        records = [
            dataclasses.replace(r, loss_nats=r.loss_nats + offset)
            if r.update >= first and r.loss_nats
            else r
            for r in records
        ]
    _write_plan(folder, records, ranks=ranks, rows=rows, seed=seed, lr=lr, text=text)
    texts = {f"train:{i}": f"row {i}: the caller asks for a code" for i in range(rows)} | {
        "train:evil": f"{EVIL} asks for a code"
    }
    jsonl = JsonlObserver(folder, text, row_text=texts.__getitem__)
    jsonl.on_event(Event(0, "started", f"run folder {folder}"))
    _evaluation(jsonl, 0, 3.6)
    jsonl.on_sample(
        SampleRecord(0, "train:1", True, "Is it a scam?", "Yes.", "base says nothing", 4)
    )
    names = matrices(layers)
    for record in records:
        update, evil = record.update, ""
        command = f"glassloop replay {folder} --update {update} --bisect"
        if faults and update in (SPIKE, BROKEN):
            record, evil = _spoilt(record), "train:evil"
        if faults and update == REDONE:
            jsonl.on_update(_louder(record, 3.0), rows_of(record, rows, drawn=drawn))
            said = f"run folder {folder}, after {update - 1} updates"
            jsonl.on_event(Event(update - 1, "resumed", said, attempt=2))
            record = dataclasses.replace(record, attempt=2)
        jsonl.on_update(
            record, rows_of(record, rows, drawn=drawn, last=evil) if text != "none" else ()
        )
        if update == 1 or update % probe_every == 0:
            jsonl.on_probe(
                dataclasses.replace(
                    probe_record(update, names, drawn=drawn), attempt=record.attempt
                )
            )
        slow = "throttled" if faults and update == SLOW else None
        read = machine_record(update, ranks, slow=slow)
        jsonl.on_machine(dataclasses.replace(read, attempt=record.attempt))
        if faults:
            _tell_faults(jsonl, record, command)
        if update % max(1, updates // 4) == 0:
            _evaluation(jsonl, update, 1.6 + 2 * math.exp(-3 * update / updates) + offset)
    jsonl.on_sample(
        SampleRecord(updates, "train:1", False, "Is it a scam?", "Yes.", f"adapter says {EVIL}", 6)
    )
    if end:
        jsonl.on_event(Event(updates, end, f"run folder {folder}"))
    jsonl.close()
    return folder


def _write_plan(
    folder: Path,
    records: list[UpdateRecord],
    *,
    ranks: int,
    rows: int,
    seed: int,
    lr: float,
    text: TextPolicy,
) -> None:
    """config.yaml, plan.json and env.json of a run."""
    config = {
        "seed": seed,
        "model": {"id": "tiny"},
        "data": {"source": "calls.jsonl", "system": "Secret system prompt."},
        "optimizer": {"lr": lr, "max_grad_norm": 1.0},
        "execution": {"precision": "fp32", "layout": "literal"},
        "record": {"text": text},
        "run": {"dir": str(folder.parent), "name": folder.name},
    }
    write_text(folder / "config.yaml", json.dumps(config))  # JSON is YAML
    plan = {
        "rows": rows,
        "ranks": ranks,
        "updates": len(records),
        "size": 2,
        "accumulation": 2,
        "lr": [r.lr for r in records],
    }
    by_update = {
        "rows": [r.rows for r in records],
        "supervised_tokens": [r.supervised_tokens for r in records],
    }
    write_json(
        folder / "plan.json",
        plan
        | {
            "by_update": by_update | {"real_tokens": [r.real_tokens for r in records]},
            "contract": {"engine": "peft"},
        },
    )
    write_json(
        folder / "env.json",
        {
            "schema": 1,
            "started": "2026-01-01T00:00:00+00:00",
            "packages": {"torch": "2.13.0"},
            "command": ["x"],
            "launcher_pid": random.randrange(10**6),
        },
    )


def _spoilt(record: UpdateRecord) -> UpdateRecord:
    """The record of SPIKE or BROKEN, with its fault."""
    if record.update == SPIKE:
        return _louder(record, 8.0)
    others = len(record.rank_passes) - 1
    return dataclasses.replace(
        record,
        loss_nats=math.nan,
        grad_norm_pre_clip=math.nan,
        clip_coef=None,
        action="skipped",
        reason="loss is not finite: rank 1, pass 0, row train:evil",
        rank_loss_nats=(1.7, *(math.nan,) * others),
    )


def _tell_faults(jsonl: JsonlObserver, record: UpdateRecord, command: str) -> None:
    """The events of SPIKE, BROKEN and SLOW."""
    update = record.update
    if update == SPIKE:
        said = "loss_spike: loss leapt, row train:evil"
        jsonl.on_event(Event(update, "alarm", said, command, {"value": 12.0}))
    if update == SLOW:
        said = f"update {SLOW} took 4.4 s where 2 s were usual: the others waited for rank 1: its "
        said += "card was throttled (heat at 88 C, clock 900 MHz, usually 1,700)"
        details = {"cause": "throttled", "rank": 1, "took_s": 4.4, "expected_s": 2.0}
        jsonl.on_event(Event(update, "slow", said, None, details))
    if update == BROKEN:
        jsonl.on_event(Event(update, "skipped", f"update {update}: {record.reason}", command))


def _louder(record: UpdateRecord, factor: float) -> UpdateRecord:
    assert record.loss_nats is not None and record.grad_norm_pre_clip is not None
    return dataclasses.replace(
        record,
        loss_nats=record.loss_nats * factor,
        grad_norm_pre_clip=record.grad_norm_pre_clip * factor,
        clip_coef=min(1.0, 1 / (record.grad_norm_pre_clip * factor)),
        alarms=("loss_spike",),
    )


def _evaluation(jsonl: JsonlObserver, update: int, loss: float) -> None:
    scores = {
        "loss_nats": loss,
        "answers": 40,
        "accuracy": 0.5 + 0.3 * (update > 0),
        "precision": None,
    }
    jsonl.on_evaluation(
        EvaluationRecord(
            update, loss, 40, 900, scores, scores | {"loss_nats": 3.6, "accuracy": 0.5}, 1.5
        )
    )
