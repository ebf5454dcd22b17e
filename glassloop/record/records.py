"""Records of updates, rows and events that every observer gets.

Everything that people see of a run, in the terminal, in metrics.jsonl, in a tracker, comes from one
of these. A value that does not exist under a layout or a reduction is None, never 0. Nothing here
imports torch.
"""

from __future__ import annotations

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

    update: int
    """1 .. updates. A window keeps its number, also when it is skipped."""
    updates: int
    """Updates of the run."""
    epoch: int
    """0-based pass over the rows that the window belongs to."""
    rows: int
    """Rows of the window, over all ranks."""
    lr: float
    """The learning rate that was applied."""
    loss_nats: float | None
    """Token mean over all ranks: sum of loss / N. None if the window has no supervised token."""
    grad_norm_pre_clip: float | None
    """L2 norm of the whole gradient, unscaled, before clipping. None if nothing was
    computed."""
    clip_coef: float | None
    """min(1, max_norm / norm). None without clipping or without a step."""
    action: str
    """"applied" or "skipped"."""
    reason: str | None
    """Why it was skipped. None if it was applied."""
    supervised_tokens: int
    """N of the formula, over all ranks."""
    rank_loss_nats: tuple[float | None, ...]
    """Each rank's own token mean. None for a rank without supervised tokens, and where ranks share
    rows."""
    rank_supervised_tokens: tuple[int, ...]
    """Tokens with a label."""
    rank_real_tokens: tuple[int, ...]
    """Tokens of rows."""
    rank_slot_tokens: tuple[int, ...]
    """Places computed, padding included."""
    rank_passes: tuple[int, ...]
    """Forward and backward passes. Passes that ranks share are rank 0's."""
    rank_grad_norm: tuple[float, ...] | None
    """L2 norm of each rank's share of the sum, before reduction. None under ddp, and where ranks
    share rows."""
    rank_cosine: float | None
    """Mean cosine between ranks' shares, weighted by their norms. None under ddp, with one rank,
    and where ranks share rows."""
    loss_scale: float | None
    """The factor on the loss in this update. None but in fp16."""
    update_s: float
    """Rank 0: wall time of the whole update: data, passes, gate, reduction, optimizer."""
    compute_s: float
    """Rank 0: until its passes were done and the ranks' results were in hand."""
    reduce_s: float
    """Rank 0: summing gradients over ranks and taking the norm."""
    rank_peak_gib: tuple[float, ...] | None
    """Largest allocation on the GPU since the run began. None without a GPU."""
    optimizer_s: float = 0.0
    """Rank 0: clipping and the step. On a GPU until they were started: they end in the next
    update's compute_s."""
    noise_scale_tokens: float | None = None
    """Gradient noise scale, smoothed, in supervised tokens. None if no two parts of the update
    are seen apart: under ddp with several ranks, between probes of one rank."""
    rank_passes_s: tuple[float, ...] | None = None
    """Each rank's passes alone; the rest of compute_s is waiting and the gate. None in records
    of an older glassloop."""
    b_lr: float | None = None
    """The learning rate of B under LoRA+. None if it is that of A, lr."""
    alarms: tuple[str, ...] = ()
    """Kinds of what the detectors found; events.jsonl says more."""
    attempt: int = 1
    """Raised each time that a resumed run does the update again."""
    schema: int = SCHEMA
    """Version of the record."""

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
    """The update's number."""
    rank_sm_clock_mhz: tuple[float | None, ...] | None
    """Clock of the card's processors. None without NVML."""
    rank_memory_clock_mhz: tuple[float | None, ...] | None
    """Clock of the card's memory. None without NVML."""
    rank_power_w: tuple[float | None, ...] | None
    """Power of the card. None without NVML."""
    rank_temperature_c: tuple[float | None, ...] | None
    """Heat of the card, the highest reading. None without NVML."""
    rank_throttle: tuple[str | None, ...] | None
    """Reasons that slowed the card, such as "heat + power cap"; empty text for none. None without
    NVML."""
    rank_card_busy: tuple[float | None, ...] | None
    """Share of time in which a kernel ran. None without NVML."""
    rank_pcie_in_mb_s: tuple[float | None, ...] | None
    """Traffic from host to card. None without NVML or if the card does not tell."""
    rank_pcie_out_mb_s: tuple[float | None, ...] | None
    """Traffic from card to host. None without NVML or if the card does not tell."""
    rank_other_processes: tuple[float | None, ...] | None
    """Processes that compute on the card beside the run's ranks, the most. None without NVML, or
    if the driver hides processes, as in containers."""
    rank_device_allocations: tuple[float | None, ...] | None
    """Calls that took memory from CUDA. None without a GPU."""
    rank_host_gib: tuple[float | None, ...] | None
    """Resident memory of the rank's process, at the gate. None but on Linux."""
    rank_host_free_gib: tuple[float | None, ...] | None
    """Memory that the host could give, the lowest reading. None but on Linux, or before the first
    reading."""
    rank_page_faults: tuple[float, ...]
    """Page faults that were answered from memory."""
    rank_disk_faults: tuple[float, ...]
    """Page faults that waited for a disk."""
    rank_read_mib: tuple[float | None, ...] | None
    """Read from disks. None if the host does not tell a process's own reads."""
    rank_cpu_s: tuple[float, ...]
    """Processor time of all threads of the process."""
    rank_preempted: tuple[float, ...]
    """Times that another process took its processor."""
    rank_processor_wait_s: tuple[float | None, ...] | None = None
    """Time that the training thread was ready to run and had no processor. None but on Linux, and
    in records of an older glassloop."""
    slow: str | None = None
    """Likely cause of a slow update: throttled, shared card, allocator, disk, host, rank,
    reduction or unknown. None for one that was not slow."""
    attempt: int = 1
    """As the update's."""
    schema: int = SCHEMA
    """Version of the record."""


@dataclass(frozen=True)
class ProbeRecord:
    """Every adapter matrix in one update.

    Tuples have one entry a matrix, in the order of `matrices`, or one a module.

    Innocent values: fresh B is 0, so in update 1 A's gradient is 0 and B has no ratio; a skipped
    update moves nothing.
    """

    update: int
    """The update's number."""
    applied: bool
    """False: the optimizer did not move, and all that tells of its step is None."""
    matrices: tuple[str, ...]
    """Names, such as "layers.0.self_attn.q_proj.A"."""
    grad_norm: tuple[float, ...]
    """L2 norm of the gradient, unscaled, before clipping."""
    weight_norm: tuple[float, ...]
    """L2 norm before the step."""
    update_norm: tuple[float, ...] | None
    """L2 norm of theta(u) - theta(u - 1). None if the update was not applied."""
    update_to_weight: tuple[float | None, ...] | None
    """update_norm / weight_norm. None for a matrix that was 0, and if the update was not
    applied."""
    unmoved_share: tuple[float, ...] | None
    """Share of the entries that are bit for bit the same after the step. None if the update was
    not applied."""
    modules: tuple[str, ...]
    """Names, such as "layers.0.self_attn.q_proj"."""
    delta_norm: tuple[float, ...] | None
    """Frobenius norm of the change of (alpha/r) B A. None if the update was not applied."""
    all_update_to_weight: float | None
    """update_to_weight of all matrices together. None if the update was not applied."""
    all_unmoved_share: float | None
    """unmoved_share of all matrices together. None if the update was not applied."""
    attempt: int = 1
    """As the update's."""
    schema: int = SCHEMA
    """Version of the record."""


@dataclass(frozen=True)
class RowRecord:
    """One row in one update: its place and its loss."""

    update: int
    """The update's number."""
    rank: int
    """The rank that computed it."""
    micro_batch: int
    """Index of the pass within the rank's update."""
    row_id: str
    """The row's stable id."""
    loss_sum_nats: float
    """Loss summed over the row's supervised tokens."""
    supervised_tokens: int
    """Tokens with a label."""
    real_tokens: int
    """Tokens of the row."""
    attempt: int = 1
    """As the update's."""
    schema: int = SCHEMA
    """Version of the record."""


@dataclass(frozen=True)
class Event:
    """An event for people, with the next command to type."""

    update: int
    """The last update that had begun; 0 before the first."""
    kind: str
    """Such as "started", "resumed", "checkpoint", "alarm", "skipped", "slow", "warning",
    "launch", "finished", "stopped", "failed"."""
    message: str
    """A sentence."""
    command: str | None = None
    """What to type next. None if there is nothing to do."""
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers of the sentence, by name."""
    attempt: int = 1
    """Of the updates that the process does."""
    schema: int = SCHEMA
    """Version of the record."""


@dataclass(frozen=True)
class EvaluationRecord:
    """Scores on held-out rows after `update` updates.

    `scores` is the adapter's; `base` is the same model without it, None if not asked.
    """

    update: int
    """Updates done before."""
    loss_nats: float
    """Token mean over all held-out rows, of all ranks."""
    rows: int
    """Held-out rows, over all ranks."""
    supervised_tokens: int
    """Tokens with a label, over all ranks."""
    scores: dict[str, float | None]
    """By name, over all ranks; loop/evaluation.py has the names. None for a score that has no
    rows to stand on."""
    base: dict[str, float | None] | None = None
    """The scores of the model without its adapter. None if they were not asked for."""
    seconds: float = 0.0
    """Rank 0: wall time of the evaluation."""
    attempt: int = 1
    """Of the evaluation; it may be repeated where the update is not."""
    schema: int = SCHEMA
    """Version of the record."""


@dataclass(frozen=True)
class SampleRecord:
    """An answer that the model generated."""

    update: int
    """Updates done when it was generated."""
    row_id: str
    """The row's stable id."""
    base: bool
    """True: the model without its adapter."""
    prompt: str | None
    """The row's text up to the answer. None if record.text keeps it out."""
    expected: str | None
    """The row's own answer. None if it has none, or record.text keeps it out."""
    answer: str
    """The generated text."""
    answer_tokens: int
    """Generated tokens, EOS included."""
    attempt: int = 1
    """Of the evaluation."""
    schema: int = SCHEMA
    """Version of the record."""


AnyRecord = (
    UpdateRecord | MachineRecord | ProbeRecord | RowRecord | Event | EvaluationRecord | SampleRecord
)


def to_json(record: AnyRecord) -> str:
    """Return one line of JSON without line break.

    Infinite and NaN numbers become the strings "inf", "-inf", "nan", so any parser reads it.
    """
    fields = vars(record)  # in their order; copying them would cost more than the line
    try:
        return _STRICT.encode(fields)
    except ValueError:  # a number that JSON has not
        return _STRICT.encode(_plain(fields))


_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
