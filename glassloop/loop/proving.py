"""The fast engine's proof at the start of a run.

And what a run does without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.base.card_errors import first_line, lacks_memory, lost_card
from glassloop.config import Config
from glassloop.data.rows import Row
from glassloop.engines.build import Engine
from glassloop.engines.peft import PeftEngine, recompute_layers
from glassloop.formula.dist import gather_objects
from glassloop.formula.optim import FlatAdapters
from glassloop.plan.engine import Choice

FULL = "the card is too full for any engine: close other programs on it, or set memory.profile=min"
FAILED = (
    "the card answers this process no more. Start again with execution.engine=peft; if that fails "
    "too, `glassloop doctor` and the driver's log (dmesg | grep NVRM) say more"
)


@dataclass(frozen=True)
class Doubt:
    """What speaks against fused on a rank; empty without any.

    `cure`: where the card is at fault, so that another engine would fail as well.
    """

    said: str
    cure: str = ""


def proven(
    asked: Config, engine: Engine, adapters: FlatAdapters, rows: Sequence[Row], pad_id: int
) -> tuple[Engine, Choice | None]:
    """Return the engine that computes this run.

    With it why it is not fused, if fused is not sound.

    All ranks take part and decide alike: one rank's doubt is everyone's. Other engines pass.

    Args:
        asked: the run's config before `auto` was replaced by an engine's name.
        rows: of the training set; some short pieces of them go through both engines.

    Raises:
        ValueError: fused was named and does not agree with the reference; names the matrix. Or the
            card failed, with which no engine computes.
    """
    if engine.name != "fused":
        return engine, None
    doubts = gather_objects(doubt_of(asked, engine, adapters, rows, pad_id))
    for rank, one in enumerate(doubts):
        if one.cure:
            raise ValueError(f"rank {rank}, before update 1: {one.said}: {one.cure}")
    doubt = next((one.said for one in doubts if one.said), "")
    if not doubt:
        return engine, None
    if asked.execution.engine != "auto":
        raise ValueError(
            f"execution.engine = fused: {doubt}: set execution.engine=peft, "
            "and please report this with the run's versions (glassloop doctor lists them)"
        )
    hf, report = engine.hf, engine.report
    if asked.execution.checkpointing:
        recompute_layers(hf.get_base_model())  # type: ignore[operator]
    return PeftEngine(hf, report).train(), Choice("peft", doubt)


def doubt_of(
    asked: Config, engine: Engine, adapters: FlatAdapters, rows: Sequence[Row], pad_id: int
) -> Doubt:
    """What speaks against fused on this rank."""
    from glassloop.engines.fused.proof import disagreement

    packed = asked.execution.layout != "literal"
    try:
        return Doubt(disagreement(engine, adapters, rows, packed=packed, pad_id=pad_id))  # type: ignore[arg-type]
    except Exception as error:  # a kernel that does not compile, an interface that has changed
        said = f"fused fails on a short row ({type(error).__name__}: {first_line(error)})"
        if lacks_memory(error):  # the reference needs more
            return Doubt(said, FULL)
        return Doubt(said, FAILED if lost_card(error) else "")
