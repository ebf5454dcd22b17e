"""Sections on how a run is executed, watched, kept and resumed.

The other sections are in config.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Engine = Literal["auto", "peft", "fused", "unsloth"]
# That a run can end up with.
ENGINES: tuple[str, ...] = tuple(engine for engine in get_args(Engine) if engine != "auto")


MANY_LINES = ("system",)  # fields of text that a model reads
OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _one_line(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse control characters in names and paths.

        They are printed and become files' names.
        """
        texts = value if isinstance(value, tuple) else (value,)
        if info.field_name not in MANY_LINES and any(
            isinstance(text, str) and OBEYED.search(text) for text in texts
        ):
            raise ValueError("it holds a control character, such as a line break; remove it")
        return value


class ExecutionConfig(Section):
    """How an update is computed. Nothing here changes its gradient beyond rounding."""

    engine: Engine = "auto"
    """auto: fused on a CUDA GPU if it supports the run, else peft; the header says which, and why.
    peft: transformers + PEFT + bitsandbytes, the reference. fused: glassloop's own path for Llama
    and Qwen2 in NF4, for speed. unsloth: the model as Unsloth loads and patches it (extra
    `unsloth`, a GPU)."""
    layout: Literal["literal", "packed", "split"] = "literal"
    """literal: exactly the micro-batches asked for. packed: the same rows in as few passes as
    `pass_tokens` allows. split: packed, and all ranks compute each pass together, each rank a part
    of every row's tokens. It is for rows that one GPU's memory does not hold (fused)."""
    pass_tokens: int | None = Field(default=None, ge=8)
    """Most slot tokens of one packed pass on one rank, or of one split pass on all ranks together.
    None: batch.size x data.max_tokens. fused on a GPU with packed passes, unless memory.profile is
    min: as many as leave room to keep every layer whole, chosen at the start and kept in
    plan.json."""
    reduction: Literal["explicit", "ddp"] = "explicit"
    """explicit: one summed all-reduce of the flat gradient, in the open. ddp:
    DistributedDataParallel, for comparison."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Library for collectives. auto: nccl on GPUs, gloo on CPUs. gloo lets two ranks share one GPU,
    to check results and not speed."""
    collective_timeout_s: int = Field(default=1800, ge=10)
    """Seconds a rank waits for the others before it gives up. They include one rank's download and
    quantisation of the base."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision (autocast). Adapters, their gradients and the loss stay fp32."""
    checkpointing: bool = True
    """Recompute activations in the backward pass instead of storing them. fused: only as many as
    `memory.profile` asks for."""
    preflight: bool = True
    """Before update 1, compute each rank's heaviest pass, forward and backward, without a step. A
    run that does not fit shows it at once."""
    on_out_of_memory: Literal["smaller", "stop"] = "smaller"
    """Reaction if a rank runs out of memory in an update. smaller: all ranks re-run it in passes of
    half the rows (explicit reduction). stop: the run ends."""
    deterministic: bool = False
    """Refuse kernels whose result may differ from run to run (slower)."""


class MemoryConfig(Section):
    """What the engine `fused` may take. Nothing here changes a gradient."""

    profile: Literal["min", "fill"] | Annotated[float, Field(gt=0)] = "fill"
    """min: as little as possible. fill: what the GPU has free, to recompute fewer layers. A number:
    GiB of the GPU that a rank may use in all."""
    base: (
        Literal["auto", "gpu", "host", "sharded"]
        | Annotated[int, Field(ge=0)]
        | Annotated[str, Field(pattern=r"^\d+(\.\d+)?GiB$")]
    ) = "auto"
    """Where the quantised layers lie. gpu: all on the GPU. host: all on the host, each copied ahead
    of its use. auto: on the GPU as far as they fit. sharded: a part on each rank's GPU, copied from
    there. A whole number: layers on the GPU. 12GiB: their memory there."""
    host_gib: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Page-locked host memory, in GiB, that a rank may take for layers' large tensors, if the GPU
    is to hold little. auto: what the host has to spare, its container's limit counted, shared by
    its ranks."""


class StabilityConfig(Section):
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction of all ranks to a loss or gradient that is not finite: end the run, or skip the
    update."""
    max_skipped: int = Field(default=5, ge=1)
    """Updates in a row that may be skipped before the run ends all the same."""
    on_spike: Literal["warn", "clip", "skip", "stop"] = "warn"
    """Reaction of all ranks to a gradient norm or loss that leaps out of its window: note it, clip
    to the window's mean norm, skip the update, end the run."""
    on_vanishing: Literal["warn", "stop"] = "warn"
    """The same where the gradient norm falls out of its window."""
    on_no_learning: Literal["warn", "stop"] = "warn"
    """The same where the loss has not fallen over `no_learning_updates`."""
    on_diverged: Literal["warn", "stop"] = "warn"
    """The same where the loss stays far above the one that the run began with."""
    window_updates: int = Field(default=20, ge=8)
    """Sound updates that a new one is compared with."""
    false_alarm_rate: float = Field(default=1e-5, gt=0, le=0.05)
    """Chance that a sound update raises an alarm, for each detector."""
    no_learning_updates: int = Field(default=40, ge=10)
    """Updates over which the loss has to fall at all."""
    initial_loss_scale: float = Field(default=65536.0, gt=0)
    """fp16 only: the factor on the loss at update 1. It is halved on overflow, and doubled after
    `loss_scale_growth_updates`."""
    loss_scale_growth_updates: int = Field(default=2000, ge=1)
    """fp16 only: finite updates in a row after which the factor doubles."""


class EvaluationConfig(Section):
    every_updates: int | None = Field(default=None, ge=1)
    """Updates between evaluations on held-out rows. None: only before the first update and after
    the last."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a lower held-out loss after which the run ends. The best
    checkpoint is its result. None: all updates."""
    generate_rows: int = Field(default=8, ge=0)
    """Held-out rows that are answered in an evaluation (greedy); 0: loss only."""
    generate_batch: int | None = Field(default=None, ge=1)
    """Rows that a rank answers at once. The weights are read once a token for all of them, and
    each needs room for its keys and values. None: batch.size."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest generated answer, in tokens."""
    samples: int = Field(default=2, ge=0)
    """Rows answered before and after training, printed and kept in samples.jsonl."""


class CheckpointConfig(Section):
    every_updates: int | None = Field(default=20, ge=1)
    """Updates between checkpoints. None: only at the end."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept; the best by held-out loss is kept beside them."""
    on_failure: Literal["warn", "stop"] = "warn"
    """Reaction to a disk that refuses a checkpoint. warn: say so and continue. stop: end with exit
    code 1."""


class RecordConfig(Section):
    text: Literal["none", "ids", "full"] = "ids"
    """Content of rows in the run's folder and trackers: nothing, ids, or ids and text."""
    probe_every_updates: int | None = Field(default=10, ge=1)
    """Updates between probes of every adapter matrix (probes.jsonl). None: none."""
    machine_every_s: float | None = Field(default=0.5, ge=0.05)
    """Seconds between readings of clocks, power, heat and memory during updates (machine.jsonl);
    more, where readings would take over 0.15 % of a processor. None: none. Those of a GPU need the
    package nvidia-ml-py (extra `nvml`)."""
    capture_updates: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Updates that a capsule keeps whole, good or bad. SIGUSR1 keeps a running job's next one."""
    capsules: int = Field(default=4, ge=0)
    """Most capsules kept: the healthy one, those asked for, the newest bad ones. 0: none."""
    capsules_gib: float = Field(default=2.0, gt=0)
    """Most disk space of all capsules together, in GiB."""


class TrackingConfig(Section):
    to: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers beside the run's own folder."""
    project: str = "glassloop"
    """Project name in the tracker."""
    wandb_mode: Literal["online", "offline"] = "online"
    """online needs a Weights & Biases login. offline writes to the run's folder, to be synced
    later."""
    report: Literal["none", "no_text", "full"] = "no_text"
    """The run's report, sent to Weights & Biases as a page and to TensorBoard as text at the end.
    no_text: without row ids, texts, answers and names. full: as record.text keeps them."""
    webhook: str | None = None
    """Address that gets alarms and the end of the run as JSON, without row ids and text. https, or
    http to localhost; `env:NAME` reads it from the environment, so that no file holds it."""


class RunConfig(Section):
    dir: str = "runs"
    """Folder that holds runs."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder. None: preset, date and time."""


class ResumeConfig(Section):
    run: str | None = None
    """Folder of a run to resume, from its last complete checkpoint."""
    at: int | None = Field(default=None, ge=0)
    """Resume from the checkpoint after this many updates instead; 0: from the beginning."""
    without_windows: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Updates whose rows are left out. They are listed as skipped; the others keep their number and
    lr."""
    reshape: bool = False
    """Resume with another number of ranks than saved the checkpoint: the same rows in the same
    order, the same rows an update."""
