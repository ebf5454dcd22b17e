"""One record of each kind, on two ranks."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import numpy as np

from glassloop.record.records import ProbeRecord, RowRecord, SampleRecord, UpdateRecord

ID, TEXT = "train:17", "the caller asks for a gift card"


def update_record(update: int = 1, **changes: Any) -> UpdateRecord:
    """An applied update of 60, with `changes`."""
    base = UpdateRecord(
        update=update,
        updates=60,
        epoch=0,
        rows=16,
        lr=2e-4,
        loss_nats=2.5,
        grad_norm_pre_clip=1.234,
        clip_coef=0.81,
        action="applied",
        reason=None,
        supervised_tokens=400,
        rank_loss_nats=(1.0, 3.0),
        rank_supervised_tokens=(100, 300),
        rank_real_tokens=(150, 450),
        rank_slot_tokens=(1000, 1000),
        rank_passes=(4, 4),
        rank_grad_norm=(0.7, 0.8),
        rank_cosine=0.9,
        loss_scale=None,
        update_s=2.0,
        compute_s=1.5,
        reduce_s=0.1,
        rank_peak_gib=None,
    )
    return dataclasses.replace(base, **changes)


def row_record(update: int = 1, rank: int = 0, row_id: str = ID, **changes: Any) -> RowRecord:
    """A row of an update, with `changes`."""
    base = RowRecord(
        update,
        rank,
        row_id=row_id,
        micro_batch=0,
        loss_sum_nats=3.5,
        supervised_tokens=5,
        real_tokens=9,
    )
    return dataclasses.replace(base, **changes)


def probe_record() -> ProbeRecord:
    """Probe one module at update 1, where B is 0."""
    return ProbeRecord(
        update=1,
        applied=True,
        matrices=("m.A", "m.B"),
        grad_norm=(0.0, 1.0),
        weight_norm=(2.0, 0.0),
        update_norm=(0.0, 0.1),
        update_to_weight=(0.0, None),
        unmoved_share=(1.0, 0.0),
        modules=("m",),
        delta_norm=(0.2,),
        all_update_to_weight=0.05,
        all_unmoved_share=0.5,
    )


def sample(**changes: Any) -> SampleRecord:
    """An answer of the adapter, with `changes`."""
    base = SampleRecord(
        update=1, row_id=ID, base=False, prompt=TEXT, expected=TEXT, answer="scam", answer_tokens=2
    )
    return dataclasses.replace(base, **changes)


def decoded(packed: dict) -> list[float]:
    """The numbers of a packed column."""
    return np.frombuffer(base64.b64decode(packed["f32"]), dtype="<f4").tolist()
