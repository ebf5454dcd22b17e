"""A config as work for one rank.

Its heaviest pass decides predicted memory; a budget decides the size of packed passes. Imports
nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from glassloop.config import Config
from glassloop.predict.cards import budget_bytes
from glassloop.predict.hardware import PLANNED_FOR, Present, gpu_named
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import Shapes
from glassloop.predict.spend import chosen_pass, with_tiers
from glassloop.predict.terms import GIB, Ledger, Work


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
    heaviest_share: int  # real tokens of an update on the rank that has most
    # Places of the rank that has most over the mean rank's, less 1, in the layout of the run: the
    # others wait for it.
    rank_excess_mean: float = 0.0  # of all updates
    rank_excess_worst: float = 0.0  # of one update

    @property
    def padding_share(self) -> float:
        """Share of the literal layout's places that are padding."""
        return 1 - self.real / self.literal_slots


def chooses_passes(config: Config) -> bool:
    """True if a run chooses the size of its packed passes.

    It does so on a GPU, by what memory has room for.
    """
    execution = config.execution
    packed = execution.layout == "packed" and execution.pass_tokens is None
    return packed and execution.engine == "fused" and config.memory.profile != "min"


def pass_tokens_for(config: Config, shapes: Shapes | None, budget_bytes: int | None) -> int:
    """Most tokens of a packed pass.

    As asked; or, if that is left to the run, as many as every layer can keep whole. budget_bytes:
    what torch may take of a GPU; None: no GPU, or an unknown one.
    """
    asked = config.execution.pass_tokens or config.batch.size * config.data.max_tokens
    if shapes is None or budget_bytes is None or not chooses_passes(config):
        return asked
    return max(config.data.max_tokens, chosen_pass(shapes, work_of(config, shapes), budget_bytes))


def work_of(
    config: Config,
    shapes: Shapes,
    counts: TokenCounts | None = None,
    share: int | None = None,
) -> Work:
    """The heaviest pass of a run.

    The real one if rows were counted, else full rows with every token supervised. share: most
    tokens of an update on one rank, if the run chooses the size of passes.
    """
    packed = config.execution.layout != "literal"
    limit = config.execution.pass_tokens or config.batch.size * config.data.max_tokens
    if counts is not None:
        rows, tokens, supervised = (
            counts.heaviest_rows,
            counts.heaviest_tokens,
            counts.heaviest_supervised,
        )
    else:
        rows, tokens, supervised = (
            (1, limit, None) if packed else (config.batch.size, config.data.max_tokens, None)
        )
    return Work(
        rows=rows,
        tokens=tokens,
        supervised_tokens=supervised,
        r=config.lora.most_rank,
        targets=shapes.apart(config.lora.targets),
        trained_tokens=len(config.lora.trainable_token_indices),
        quantization=config.model.quantization,
        double_quantization=config.model.double_quantization,
        precision=config.execution.precision,
        checkpointing=config.execution.checkpointing,
        optimizer=config.optimizer.name,
        packed=packed,
        attention=config.model.attention,
        reduction=config.execution.reduction,
        profile=config.memory.profile,
        host_gib=None if config.memory.host_gib == "auto" else config.memory.host_gib,
        base=config.memory.base,
        between=(config.data.max_tokens, max(share, config.data.max_tokens))
        if share and chooses_passes(config)
        else None,
        longest_row=config.data.max_tokens,
    )


def usual_budget(present: Sequence[Present], ranks: int) -> tuple[str, int]:
    """The card of a detailed plan, and its budget.

    It is this machine's, else the first that every plan shows. Budget: bytes that torch may take of
    it.
    """
    for card in present:
        if card.gpu is not None:
            return card.gpu.key, budget_bytes(card.free_gib, ranks)
    gpu = gpu_named(PLANNED_FOR[0])
    assert gpu is not None
    return gpu.key, budget_bytes(gpu.usable_gib, ranks)


def ledgers_of(
    shapes: Shapes, work: Work, engine: str, usual: int
) -> tuple[Ledger, Ledger, tuple[str, str], Work]:
    """Memory as asked and another way, their names, and the work.

    The other: the base in its other form; for `fused` the least that it needs, or, if that is
    asked, every layer kept whole. usual: bytes that torch may take of the card that packed passes
    are cut for.
    """
    if engine != "fused":
        other = replace(work, quantization="none" if work.quantization == "nf4" else "nf4")
        names = ("NF4", work.precision) if work.quantization == "nf4" else (work.precision, "NF4")
        return ledger_of(shapes, work, engine), ledger_of(shapes, other, engine), names, work
    work = replace(with_tiers(shapes, work, usual), tiers=None)
    least = ledger_of(
        shapes, with_tiers(shapes, replace(work, profile="min", checkpointing=True), usual), engine
    )
    whole = ledger_of(shapes, with_tiers(shapes, replace(work, checkpointing=False), usual), engine)
    if not work.checkpointing or work.profile == "fill":
        return whole, least, ("all kept", "min"), work
    if work.profile == "min":
        return least, whole, ("min", "all kept"), work
    asked = with_tiers(shapes, work, int(float(work.profile) * GIB))
    return ledger_of(shapes, asked, engine), least, (f"{work.profile:g} GiB", "min"), work
