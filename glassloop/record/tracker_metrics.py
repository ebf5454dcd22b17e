"""Name the values of records as trackers show them."""

from __future__ import annotations

import dataclasses
import math

from glassloop.record.records import (
    EvaluationRecord,
    MachineRecord,
    ProbeRecord,
    UpdateRecord,
)


def update_metrics(record: UpdateRecord) -> dict[str, float | int]:
    """Return an update's values under the trackers' names.

    Missing values are left out. NaN stays: a curve shows it.
    """
    values: dict[str, float | int | None] = {
        "train/loss_nats": record.loss_nats,
        "train/lr": record.lr,
        "train/grad_norm_pre_clip": record.grad_norm_pre_clip,
        "train/clip_coef": record.clip_coef,
        "train/epoch": record.epoch,
        "train/rows": record.rows,
        "train/skipped": int(record.action == "skipped"),
        "train/loss_scale": record.loss_scale,
        "train/rank_cosine": record.rank_cosine,
        "tokens/supervised": record.supervised_tokens,
        "tokens/real": record.real_tokens,
        "tokens/slot": record.slot_tokens,
        "speed/real_tokens_per_s_all_ranks": record.real_tokens_per_s,
        "speed/update_s": record.update_s,
        "speed/compute_s": record.compute_s,
        "speed/reduce_s": record.reduce_s,
        "speed/optimizer_s": record.optimizer_s,
        "train/noise_scale_tokens": record.noise_scale_tokens,
        "train/alarms": len(record.alarms),
    }
    for rank, loss in enumerate(record.rank_loss_nats):
        values[f"rank{rank}/loss_nats"] = loss
        values[f"rank{rank}/supervised_tokens"] = record.rank_supervised_tokens[rank]
        values[f"rank{rank}/real_tokens"] = record.rank_real_tokens[rank]
        values[f"rank{rank}/slot_tokens"] = record.rank_slot_tokens[rank]
        values[f"rank{rank}/passes"] = record.rank_passes[rank]
        values[f"rank{rank}/grad_norm"] = (
            None if record.rank_grad_norm is None else record.rank_grad_norm[rank]
        )
        values[f"memory/rank{rank}_peak_gib"] = (
            None if record.rank_peak_gib is None else record.rank_peak_gib[rank]
        )
    return {name: value for name, value in values.items() if value is not None}


def machine_metrics(record: MachineRecord) -> dict[str, float]:
    """Return what was read of each rank's machine, under machine/."""
    return {
        f"machine/rank{rank}_{field.name.removeprefix('rank_')}": value
        for field in dataclasses.fields(record)
        if field.name.startswith("rank_")
        for rank, value in enumerate(getattr(record, field.name) or ())
        if isinstance(value, float)
    }


def probe_metrics(record: ProbeRecord) -> dict[str, float]:
    """What holds for all matrices together; probes.jsonl has each of them."""
    values = {
        "probe/update_to_weight": record.all_update_to_weight,
        "probe/unmoved_share": record.all_unmoved_share,
        "probe/delta_norm": None if record.delta_norm is None else math.hypot(*record.delta_norm),
    }
    return {name: value for name, value in values.items() if value is not None}


def evaluation_metrics(record: EvaluationRecord) -> dict[str, float | int]:
    """An evaluation's values under heldout/, the model without adapter under heldout/base/."""
    values: dict[str, float | int | None] = {
        f"heldout/{name}": value for name, value in record.scores.items()
    }
    values |= {f"heldout/base/{name}": value for name, value in (record.base or {}).items()}
    values |= {
        "heldout/loss_nats": record.loss_nats,
        "heldout/rows": record.rows,
        "heldout/supervised_tokens": record.supervised_tokens,
        "heldout/seconds": record.seconds,
    }
    return {name: value for name, value in values.items() if value is not None}
