"""Records of updates, rows and events that every observer gets.

Everything that people see of a run, in the terminal, in metrics.jsonl, in a tracker, comes from one
of these. A value that does not exist under a layout or a reduction is None, never 0. Nothing here
imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1  # raised when a field changes its meaning; readers open older ones


@dataclass(frozen=True)
class UpdateRecord:
    """One update.

    Tuples have one entry a rank, in rank order. Losses are in nats a supervised token.
    """

    update: int  # 1 .. updates; a window keeps its number, also when it is skipped
    updates: int  # updates of the run
    epoch: int  # 0-based pass over the rows that the window belongs to
    rows: int  # rows of the window, over all ranks
    lr: float  # the learning rate that was applied
    loss_nats: (
        float | None
    )  # global token mean: sum of loss / N; None if the window has no supervised token
    grad_norm_pre_clip: (
        float | None
    )  # L2 norm of the whole gradient, unscaled, before clipping; None if there is none
    clip_coef: float | None  # min(1, max_norm / norm); None without clipping or without a step
    action: str  # "applied" | "skipped"
    reason: str | None  # why it was skipped; None if it was applied
    supervised_tokens: int  # N of the formula, over all ranks
    rank_loss_nats: tuple[
        float | None, ...
    ]  # each rank's own token mean; None for a rank without supervised tokens
    rank_supervised_tokens: tuple[int, ...]
    rank_real_tokens: tuple[int, ...]  # tokens of rows
    rank_slot_tokens: tuple[int, ...]  # places computed, padding included
    rank_passes: tuple[int, ...]  # forward + backward passes
    rank_grad_norm: (
        tuple[float, ...] | None
    )  # of each rank's share of the sum, before reduction; None under ddp
    rank_cosine: (
        float | None
    )  # mean cosine between ranks' shares, weighted by their norms; None under ddp or with one rank
    loss_scale: float | None  # fp16: the factor on the loss in this update; None otherwise
    update_s: (
        float  # wall time of the whole update on rank 0: data, passes, gate, reduction, optimizer
    )
    compute_s: float  # rank 0: until its passes were done and the ranks' results were in hand
    reduce_s: float  # rank 0: summing gradients over ranks and taking the norm
    rank_peak_gib: (
        tuple[float, ...] | None
    )  # largest allocation since the run began; None without a GPU
    # rank 0: clipping and the step; on a GPU until they were started: they end in the next update's
    # compute_s
    optimizer_s: float = 0.0
    noise_scale_tokens: float | None = (
        # gradient noise scale, smoothed, in supervised tokens; None if no parts tell (see
        # noise.py)
        None
    )
    rank_passes_s: tuple[float, ...] | None = (
        None  # each rank's passes alone; the rest of compute_s is waiting and the gate
    )
    alarms: tuple[str, ...] = ()  # kinds of what the detectors found; events.jsonl says more
    attempt: int = 1  # raised each time that a resumed run does the update again
    schema: int = SCHEMA

    @property
    def real_tokens(self) -> int:
        return sum(self.rank_real_tokens)

    @property
    def slot_tokens(self) -> int:
        return sum(self.rank_slot_tokens)

    @property
    def real_tokens_per_s(self) -> float:
        """Tokens of rows a second, all ranks together."""
        return self.real_tokens / self.update_s if self.update_s > 0 else math.nan


@dataclass(frozen=True)
class MachineRecord:
    """The machine during one update, from its start to the gate.

    Tuples have one entry a rank, None for a rank that could not read the quantity. A field is None
    if no rank could. Readings of the card are means over the update's readings; an update without
    one has the newest.
    """

    update: int
    rank_sm_clock_mhz: tuple[float | None, ...] | None  # clock of the card's processors
    rank_memory_clock_mhz: tuple[float | None, ...] | None
    rank_power_w: tuple[float | None, ...] | None
    rank_temperature_c: tuple[float | None, ...] | None  # the highest reading
    rank_throttle: tuple[str | None, ...] | None  # "heat + power cap"; "" for none
    rank_card_busy: tuple[float | None, ...] | None  # share of time in which a kernel ran
    rank_pcie_in_mb_s: tuple[float | None, ...] | None  # host to card, 1e6 bytes a second
    rank_pcie_out_mb_s: tuple[float | None, ...] | None
    rank_other_processes: tuple[float | None, ...] | None  # on the card, beside the run's ranks
    rank_device_allocations: tuple[float | None, ...] | None  # calls that take memory from CUDA
    rank_host_gib: tuple[float | None, ...] | None  # resident memory of the rank's process
    rank_host_free_gib: tuple[float | None, ...] | None  # of the host, the lowest reading
    rank_page_faults: tuple[float | None, ...] | None  # answered from memory
    rank_disk_faults: tuple[float | None, ...] | None  # page faults that waited for a disk
    rank_read_mib: tuple[float | None, ...] | None  # read from disks
    rank_cpu_s: tuple[float | None, ...] | None  # processor time of all the process's threads
    rank_preempted: tuple[float | None, ...] | None  # times another process took the processor
    slow: str | None = None  # likely cause of a slow update; None for one that was not slow
    attempt: int = 1
    schema: int = SCHEMA


@dataclass(frozen=True)
class ProbeRecord:
    """Every adapter matrix in one update.

    Tuples have one entry a matrix, in the order of `matrices`, or one a module.

    Innocent values: fresh B is 0, so in update 1 A's gradient is 0 and B has no ratio; a skipped
    update moves nothing.
    """

    update: int
    applied: bool  # False: the optimizer did not move, and all that tells of its step is None
    matrices: tuple[str, ...]  # "layers.0.self_attn.q_proj.A"
    grad_norm: tuple[float, ...]  # unscaled, before clipping
    weight_norm: tuple[float, ...]  # before the step
    update_norm: tuple[float, ...] | None  # of theta(u) - theta(u - 1)
    update_to_weight: tuple[float | None, ...] | None  # None for a matrix that was 0
    unmoved_share: tuple[float, ...] | None  # of the entries, bit for bit the same after the step
    modules: tuple[str, ...]  # "layers.0.self_attn.q_proj"
    delta_norm: tuple[float, ...] | None  # Frobenius norm of the change of (alpha/r) B A
    all_update_to_weight: float | None  # of all matrices together
    all_unmoved_share: float | None
    attempt: int = 1
    schema: int = SCHEMA


@dataclass(frozen=True)
class RowRecord:
    """One row in one update: its place and its loss."""

    update: int
    rank: int
    micro_batch: int  # index of the pass within the rank's update
    row_id: str
    loss_sum_nats: float  # summed over the row's supervised tokens
    supervised_tokens: int
    real_tokens: int
    attempt: int = 1
    schema: int = SCHEMA


@dataclass(frozen=True)
class Event:
    """An event for people, with the next command to type."""

    update: int  # the last update that had begun; 0 before the first
    # "started" | "skipped" | "stopped" | "checkpoint" | "evaluation" | "warning" | "resumed" |
    # "finished" | ...
    kind: str
    message: str
    command: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1
    schema: int = SCHEMA


@dataclass(frozen=True)
class EvaluationRecord:
    """Scores on held-out rows after `update` updates.

    `scores` is the adapter's; `base` is the same model without it, None if not asked.
    """

    update: int
    loss_nats: float  # token mean over all held-out rows and ranks
    rows: int
    supervised_tokens: int
    scores: dict[
        str, float | None
    ]  # see evaluation.py for names; None if a score has no rows to stand on
    base: dict[str, float | None] | None = None
    seconds: float = 0.0
    attempt: int = 1
    schema: int = SCHEMA


@dataclass(frozen=True)
class SampleRecord:
    """An answer that the model generated.

    `prompt` and `expected` are a row's text, and None if record.text keeps it out.
    """

    update: int  # updates done when it was generated
    row_id: str
    base: bool  # True: the model without its adapter
    prompt: str | None
    expected: str | None  # the row's own answer; None if it has none
    answer: str
    answer_tokens: int  # generated tokens, EOS included
    attempt: int = 1
    schema: int = SCHEMA


AnyRecord = (
    UpdateRecord | MachineRecord | ProbeRecord | RowRecord | Event | EvaluationRecord | SampleRecord
)


def to_json(record: AnyRecord) -> str:
    """Return one line of JSON without line break.

    Infinite and NaN numbers become the strings "inf", "-inf", "nan", so any parser reads it.
    """
    return json.dumps(_plain(dataclasses.asdict(record)), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
