"""What a run will be, before it begins: step math, parameters, disk, memory and time, in plain values. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from glassloop.config import Config
from glassloop.plan import StepPlan, make_plan
from glassloop.predict.cards import Verdict, verdict
from glassloop.predict.hardware import PLANNED_FOR, Gpu, Present, gpu_named
from glassloop.predict.ledger import PROFILES, STATE_BYTES, Ledger, Work, ledger_of
from glassloop.predict.roofline import pass_time, tokens_per_s
from glassloop.predict.shapes import Shapes, shapes_of

SCHEMA = 1
TOKENIZER_BYTES = 130  # of tokenizer.json for each token of the vocabulary, about (Llama 3: 134, SmolLM2: 72)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of all updates of a run, counted from its real rows."""

    real: int
    supervised: int
    literal_slots: int  # places of padded micro-batches
    literal_passes: int
    packed_slots: int
    packed_passes: int
    heaviest_rows: int  # rows of the pass with the most places, in the layout of the run
    heaviest_tokens: int  # places of each
    heaviest_supervised: int

    @property
    def padding_share(self) -> float:
        """Share of the literal layout's places that are padding."""
        return 1 - self.real / self.literal_slots


@dataclass(frozen=True)
class CardTime:
    """A prediction of one card's speed; seconds for the whole run without evaluations and checkpoints."""

    card: str
    tokens_per_s: float  # of all ranks together
    run_s: float
    host_bound: bool


@dataclass(frozen=True)
class Outlook:
    """Everything that `glassloop plan` shows; None: not known, and `unknown` says why."""

    config: Config
    machines: int
    plan: StepPlan
    rows_from: str
    shapes: Shapes | None
    trainable: int | None
    checkpoint_bytes: int | None
    work: Work | None
    ledger: Ledger | None
    other_ledger: Ledger | None  # the same with the base in the other form: bf16 beside NF4
    verdicts: tuple[Verdict, ...]
    times: tuple[CardTime, ...]
    row_tokens: float
    tokens: TokenCounts | None
    unknown: tuple[str, ...]


def plan_of(config: Config, rows: int, ranks: int) -> StepPlan:
    """The run's step arithmetic."""
    schedule = config.schedule
    return make_plan(
        rows=rows,
        size=config.batch.size,
        ranks=ranks,
        accumulation=config.batch.accumulation_for(ranks),
        tail=config.batch.tail,
        updates=schedule.updates,
        epochs=schedule.epochs,
        warmup=schedule.warmup_updates,
        peak=config.optimizer.lr,
        kind=schedule.kind,
        first=schedule.first,
    )


def work_of(config: Config, counts: TokenCounts | None = None) -> Work:
    """The heaviest pass of a run: the real one where rows were counted, else full rows with every token supervised."""
    packed = config.execution.layout == "packed"
    limit = config.execution.pass_tokens or config.batch.size * config.data.max_tokens
    if counts is not None:
        rows, tokens, supervised = counts.heaviest_rows, counts.heaviest_tokens, counts.heaviest_supervised
    else:
        rows, tokens, supervised = (1, limit, None) if packed else (config.batch.size, config.data.max_tokens, None)
    return Work(
        rows=rows,
        tokens=tokens,
        supervised_tokens=supervised,
        r=config.lora.r,
        targets=config.lora.targets,
        quantization=config.model.quantization,
        double_quantization=config.model.double_quantization,
        precision=config.execution.precision,
        checkpointing=config.execution.checkpointing,
        optimizer=config.optimizer.name,
        packed=packed,
        attention=config.model.attention,
        reduction=config.execution.reduction,
    )


def look_ahead(
    config: Config,
    plan: StepPlan,
    *,
    rows_from: str,
    machines: int = 1,
    counts: TokenCounts | None = None,
    row_tokens: float | None = None,
    present: Sequence[Present] = (),
) -> Outlook:
    """Put an outlook together.

    Args:
        row_tokens: mean tokens of a row; None: of the counted rows, else data.max_tokens (then time is an upper bound).
        present: cards of this machine, judged by their free memory.
    """
    shapes, where = shapes_of(config.model.id)
    unknown = [] if shapes is not None else [f"memory, time and parameters: {where}"]
    mean = row_tokens or (counts.real / plan.rows_trained if counts else float(config.data.max_tokens))
    if shapes is None:
        return Outlook(
            config, machines, plan, rows_from, None, None, None, None, None, None, (), (), mean, counts, tuple(unknown)
        )
    work = work_of(config, counts)
    n = shapes.lora_weights(work.r, work.targets)
    engine = config.execution.engine
    other = replace(work, quantization="none" if work.quantization == "nf4" else "nf4")

    def judged(gpu: Gpu, free_gib: float | None = None) -> Verdict:
        return verdict(
            gpu, shapes, work, ranks=plan.ranks, rows_per_update=plan.rows_per_update, free_gib=free_gib, engine=engine
        )

    known = engine in PROFILES
    if not known:
        unknown.append(
            f"memory and time of execution.engine={engine}: it is not modelled here; preflight measures it, glassloop bench times it"
        )
    verdicts = [judged(gpu) for name in PLANNED_FOR if known and (gpu := gpu_named(name))]
    for card in present if known else ():
        if card.gpu is None:
            unknown.append(f"this machine's {card.name}: not in the table of cards, so nothing is said of it")
        else:
            verdicts.append(judged(card.gpu, card.free_gib))
    if known and config.execution.precision == "fp32":
        unknown.append("time: the rates of cards that are known are those of bf16 and fp16, execution.precision is fp32")
    return Outlook(
        config=config,
        machines=machines,
        plan=plan,
        rows_from=rows_from,
        shapes=shapes,
        trainable=n,
        checkpoint_bytes=round(4 * n + disk_state_bytes(config.optimizer.name) * n) + TOKENIZER_BYTES * shapes.vocabulary,
        work=work,
        ledger=ledger_of(shapes, work, engine) if known else None,
        other_ledger=ledger_of(shapes, other, engine) if known else None,
        verdicts=tuple(verdicts),
        times=()
        if config.execution.precision == "fp32" or not known
        else tuple(time for name in PLANNED_FOR if (time := card_time(config, plan, shapes, name, mean, counts)) is not None),
        row_tokens=mean,
        tokens=counts,
        unknown=tuple(unknown),
    )


def disk_state_bytes(optimizer: str) -> float:
    """Bytes of the optimizer's state in a checkpoint, per trainable parameter."""
    return STATE_BYTES["adamw_8bit"] if optimizer == "paged_adamw_8bit" else STATE_BYTES[optimizer]


def card_time(
    config: Config, plan: StepPlan, shapes: Shapes, card: str, row_tokens: float, counts: TokenCounts | None = None
) -> CardTime | None:
    """Predicted speed of one card over the run; None for a card without rates."""
    packed = config.execution.layout == "packed"
    padded = counts.literal_slots / counts.real if counts and not packed else 1.0  # padding is computed too
    rows, passes = float(plan.size), float(plan.accumulation)
    if packed:
        limit = config.execution.pass_tokens or config.batch.size * config.data.max_tokens
        rows = max(1.0, min(plan.rows_per_update / plan.ranks, limit / row_tokens))
        passes = plan.rows_per_update / plan.ranks / rows
    share = counts.supervised / counts.real if counts else 1.0
    one = pass_time(
        shapes,
        card,
        rows=rows * padded,
        row_tokens=row_tokens,
        supervised_share=share / padded,
        r=config.lora.r,
        targets=config.lora.targets,
        quantized=config.model.quantization == "nf4",
        checkpointing=config.execution.checkpointing,
    )
    if one is None:
        return None
    rate = tokens_per_s(one, rows=rows, row_tokens=row_tokens, passes=passes, ranks=plan.ranks)
    return CardTime(card, rate, plan.rows_trained * row_tokens / rate, one.host_bound)


def as_plain(outlook: Outlook) -> dict[str, Any]:
    """The outlook as plain JSON values; sizes in bytes, times in seconds."""
    tokens = outlook.tokens
    return {
        "schema": SCHEMA,
        "preset": outlook.config.preset,
        "plan": outlook.plan.as_dict(),
        "machines": outlook.machines,
        "rows_from": outlook.rows_from,
        "rows_trained": outlook.plan.rows_trained,
        "times_trained": outlook.plan.times_trained,
        "layout": outlook.config.execution.layout,
        "trainable_parameters": outlook.trainable,
        "checkpoint_bytes": outlook.checkpoint_bytes,
        "memory_bytes": None if outlook.ledger is None else outlook.ledger.phases,
        "memory_terms": None if outlook.ledger is None else [vars(term) for term in outlook.ledger.terms],
        "memory_bytes_other_base": None if outlook.other_ledger is None else outlook.other_ledger.phases,
        "cards": [vars(one) for one in outlook.verdicts],
        "time_predicted": [vars(one) for one in outlook.times],
        "row_tokens": outlook.row_tokens,
        "tokens": None if tokens is None else {**vars(tokens), "padding_share": tokens.padding_share},
        "unknown": list(outlook.unknown),
    }
