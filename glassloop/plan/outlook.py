"""A run's outlook: step math, parameters, disk, memory and time.

Plain values, before the run begins. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from glassloop.config import Config
from glassloop.plan.engine import planned_engine
from glassloop.plan.steps import StepPlan, counted, make_plan
from glassloop.plan.targets import trainable
from glassloop.plan.work import TokenCounts, chooses_passes, ledgers_of, usual_budget, work_of
from glassloop.predict.cards import Verdict, verdict
from glassloop.predict.fused_time import fused_pass_time
from glassloop.predict.hardware import PLANNED_FOR, Gpu, Present, gpu_named
from glassloop.predict.host import spare_bytes
from glassloop.predict.ledger import PROFILES
from glassloop.predict.roofline import pass_time, tokens_per_s
from glassloop.predict.shapes import Shapes, config_values, shapes_of
from glassloop.predict.terms import GIB, STATE_BYTES, Ledger, Work
from glassloop.predict.tiers import Tiers

SCHEMA = 1
TOKENIZER_BYTES = (
    130  # of tokenizer.json for each token of the vocabulary, about (Llama 3: 134, SmolLM2: 72)
)


@dataclass(frozen=True)
class CardTime:
    """A prediction of one card's speed.

    Seconds are for the whole run without evaluations and checkpoints.
    """

    card: str
    tokens_per_s: float  # of all ranks together
    run_s: float
    host_bound: bool
    waits_share: float = 0.0  # of the time: the GPU waits for its host


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Everything that `glassloop plan` shows; None: not known, and `unknown` says why."""

    config: Config  # with the engine that auto would choose on CUDA
    machines: int
    plan: StepPlan
    rows_from: str
    shapes: Shapes | None = None
    trainable: int | None = None
    checkpoint_bytes: int | None = None
    work: Work | None = None
    ledger: Ledger | None = None
    # With the base in its other form (bf16 beside NF4), or with the least or most that fused keeps.
    other_ledger: Ledger | None = None
    ledger_names: tuple[str, str] = ("", "")
    usual: str = ""  # the card that passes were cut for, where that depends on the card
    verdicts: tuple[Verdict, ...] = ()
    times: tuple[CardTime, ...] = ()
    row_tokens: float
    tokens: TokenCounts | None
    unknown: tuple[str, ...]
    engine: str  # that it is planned for, in words
    times_here: tuple[CardTime, ...] = ()  # of this machine's cards

    @property
    def here(self) -> tuple[Verdict, ...]:
        """Verdicts on this machine's cards."""
        return self.verdicts[len(PLANNED_FOR) :]


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
        warmup_share=schedule.warmup_share,
        peak=config.optimizer.lr,
        kind=schedule.kind,
        first=schedule.first,
    )


def overridden(config: Config) -> str:
    """Name a schedule.epochs that schedule.updates overrides, in brackets; empty without one."""
    updates, epochs = config.schedule.updates, config.schedule.epochs
    if updates is None or epochs == 1:
        return ""
    return f" (schedule.updates overrides epochs = {epochs:g})"


def early_end(config: Config) -> str:
    """Name the condition of an early end; empty without one."""
    patience, every = config.evaluation.patience, config.evaluation.every_updates
    if patience is None:
        return ""
    return (
        f", or fewer: it ends after {counted(patience, 'evaluation')} in a row, one every "
        f"{counted(every or 0, 'update')}, without a lower held-out loss"
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
        row_tokens: mean tokens of a row; None: of the counted rows, else data.max_tokens (then
            time is an upper bound).
        present: cards of this machine, judged by their free memory.
    """
    config, planned = planned_engine(config)
    shapes, where = shapes_of(config.model.id)
    mean = row_tokens or (
        counts.real / plan.rows_trained if counts else float(config.data.max_tokens)
    )
    unknown = [] if shapes is not None else [f"memory, time and parameters: {where}"]
    if shapes is None and config_values(config.model.id) is not None:
        unknown.append("weights without an adapter, or not in 4 bits: a run's header counts them")
    found = {} if shapes is None else _of_shapes(config, plan, shapes, counts, mean, present)
    unknown += found.pop("unknown", ())
    return Outlook(
        config=config,
        machines=machines,
        plan=plan,
        rows_from=rows_from,
        row_tokens=mean,
        tokens=counts,
        unknown=tuple(unknown),
        engine=planned,
        **found,
    )


def _of_shapes(
    config: Config,
    plan: StepPlan,
    shapes: Shapes,
    counts: TokenCounts | None,
    mean: float,
    present: Sequence[Present],
) -> dict[str, Any]:
    """Fields of an Outlook that need the model's shapes.

    `unknown` names what is missing.
    """
    share = plan.size * plan.accumulation * config.data.max_tokens
    work = work_of(config, shapes, counts, counts.heaviest_share if counts else share)
    n = trainable(shapes, config.lora)
    work = replace(work, ranks=plan.ranks)
    if config.execution.layout == "split":
        work = replace(work, split=plan.ranks)
    on_disk = round(4 * n + disk_state_bytes(config.optimizer.name) * n)
    found: dict[str, Any] = {
        "shapes": shapes,
        "trainable": n,
        "checkpoint_bytes": on_disk + TOKENIZER_BYTES * shapes.vocabulary,
        "work": work,
    }
    engine = config.execution.engine
    usual = usual_budget(present, plan.ranks)
    if engine not in PROFILES:
        why = (
            f"memory and time of execution.engine={engine}: it is not modelled here; preflight "
            "measures it, glassloop bench times it"
        )
        return found | {"usual": usual[0], "unknown": (why,)}
    planned, here, unknown = _verdicts(plan, shapes, work, engine, present)

    def times(of: Sequence[Verdict]) -> tuple[CardTime, ...]:
        if config.execution.precision == "fp32":
            return ()
        found = (card_time(config, plan, shapes, v.card, mean, counts, on_card=v) for v in of)
        return tuple(time for time in found if time is not None)

    if config.execution.precision == "fp32":
        unknown.append(
            "time: the rates of cards that are known are those of bf16 and fp16, "
            "execution.precision is fp32"
        )
    ledger, other, names, work = ledgers_of(shapes, work, engine, usual[1])
    return found | {
        "work": work,
        "ledger": ledger,
        "other_ledger": other,
        "ledger_names": names,
        "usual": usual[0],
        "verdicts": (*planned, *here),
        "times": times(planned),
        "times_here": times(here),
        "unknown": unknown,
    }


def _verdicts(
    plan: StepPlan, shapes: Shapes, work: Work, engine: str, present: Sequence[Present]
) -> tuple[list[Verdict], list[Verdict], list[str]]:
    """Judge the planned cards and this machine's.

    The third list names cards that are unknown.
    """

    def judged(gpu: Gpu, free_gib: float | None = None, of: Work = work) -> Verdict:
        return verdict(
            gpu,
            shapes,
            of,
            ranks=plan.ranks,
            rows_per_update=plan.rows_per_update,
            free_gib=free_gib,
            engine=engine,
        )

    planned = [judged(gpu) for name in PLANNED_FOR if (gpu := gpu_named(name))]
    unknown, on_this = [], work
    if present and engine == "fused":
        try:
            on_this = replace(work, host_has_gib=spare_bytes() / GIB / len(present))
        except ValueError as error:
            unknown.append(f"this machine's host memory: {error}")
    here = [judged(card.gpu, card.free_gib, on_this) for card in present if card.gpu is not None]
    unknown += [
        f"this machine's {card.name}: not in the table of cards, so nothing is said of it"
        for card in present
        if card.gpu is None
    ]
    return planned, here, unknown


def disk_state_bytes(optimizer: str) -> float:
    """Bytes of the optimizer's state in a checkpoint, per trainable parameter."""
    return STATE_BYTES["adamw_8bit"] if optimizer == "paged_adamw_8bit" else STATE_BYTES[optimizer]


def card_time(
    config: Config,
    plan: StepPlan,
    shapes: Shapes,
    card: str,
    row_tokens: float,
    counts: TokenCounts | None = None,
    on_card: Verdict | None = None,
) -> CardTime | None:
    """Predict the speed of one card; None for a card without rates.

    on_card: what the engine `fused` keeps there.
    """
    packed = config.execution.layout != "literal"
    padded = (
        counts.literal_slots / counts.real if counts and not packed else 1.0
    )  # padding is computed too
    rows, passes = float(plan.size), float(plan.accumulation)
    if packed:
        limit = config.execution.pass_tokens or config.batch.size * config.data.max_tokens
        if on_card is not None and on_card.pass_tokens is not None and chooses_passes(config):
            limit = on_card.pass_tokens
        split = config.execution.layout == "split"  # each rank computes its part of every row
        most = float(plan.rows_per_update if split else plan.rows_per_update / plan.ranks)
        rows = max(1.0, min(most, limit / row_tokens))
        passes = most / rows
        rows /= plan.ranks if split else 1
    share = counts.supervised / counts.real if counts else 1.0
    work: dict[str, Any] = dict(
        rows=rows * padded, row_tokens=row_tokens, supervised_share=share / padded
    )
    work |= dict(r=config.lora.most_rank, targets=shapes.apart(config.lora.targets))
    if config.execution.engine == "fused":
        one = fused_pass_time(shapes, card, **work, tiers=_tiers(on_card))
    else:
        quantized, checkpointing = (
            config.model.quantization == "nf4",
            config.execution.checkpointing,
        )
        one = pass_time(shapes, card, **work, quantized=quantized, checkpointing=checkpointing)
    if one is None:
        return None
    rate = tokens_per_s(one, rows=rows, row_tokens=row_tokens, passes=passes, ranks=plan.ranks)
    waits = one.waits_s / one.seconds
    return CardTime(card, rate, plan.rows_trained * row_tokens / rate, one.host_bound, waits)


def _tiers(on_card: Verdict | None) -> Tiers | None:
    """Tiers of `fused` on a card, for its speed."""
    if on_card is None or on_card.kept is None:
        return None
    return Tiers.of({one.name: getattr(on_card, one.name) for one in fields(Tiers)})


def as_plain(outlook: Outlook) -> dict[str, Any]:
    """The outlook as plain JSON values; sizes in bytes, times in seconds."""
    tokens, fused = outlook.tokens, outlook.config.execution.engine == "fused"
    return {
        "schema": SCHEMA,
        "preset": outlook.config.preset,
        "plan": outlook.plan.as_dict(),
        "machines": outlook.machines,
        "rows_from": outlook.rows_from,
        "rows_trained": outlook.plan.rows_trained,
        "times_trained": outlook.plan.times_trained,
        "layout": outlook.config.execution.layout,
        "engine": outlook.config.execution.engine,
        "engine_in_words": outlook.engine,
        "trainable_parameters": outlook.trainable,
        "checkpoint_bytes": outlook.checkpoint_bytes,
        "memory_bytes": None if outlook.ledger is None else outlook.ledger.phases,
        "memory_terms": None
        if outlook.ledger is None
        else [vars(term) for term in outlook.ledger.terms],
        "memory_of": list(outlook.ledger_names),
        "memory_bytes_other_base": None
        if fused or outlook.other_ledger is None
        else outlook.other_ledger.phases,
        "memory_bytes_other_tiers": outlook.other_ledger.phases
        if fused and outlook.other_ledger is not None
        else None,
        "cards": [asdict(one) for one in outlook.verdicts],
        "time_predicted": [vars(one) for one in outlook.times],
        "row_tokens": outlook.row_tokens,
        "tokens": None
        if tokens is None
        else {**vars(tokens), "padding_share": tokens.padding_share},
        "unknown": list(outlook.unknown),
    }
