"""Checks of a machine's cards: driver, kind and number, precision, free memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glassloop.config import Config
from glassloop.doctor.checks import numbers
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
from glassloop.plan.engine import planned_engine
from glassloop.plan.work import work_of
from glassloop.predict.cards import verdict
from glassloop.predict.hardware import Present
from glassloop.predict.ledger import PROFILES
from glassloop.predict.shapes import shapes_of

DRIVERS = {12: (525, 60), 13: (580, 0)}  # CUDA's major version: the oldest driver that runs it


def check_cards(
    config: Config, present: Sequence[Present], cuda: str | None, environ: Mapping[str, str]
) -> list[Finding]:
    """Check driver, CUDA, bf16, the cards and their free memory."""
    if not present:
        if cuda is None:
            return [
                Finding(
                    NOTE,
                    "gpu",
                    "none, and torch is a CPU build: runs are for trying things out",
                    "",
                )
            ]
        return [
            Finding(
                NOTE,
                "gpu",
                f"nvidia-smi shows none; torch is built for CUDA {cuda}",
                "install the NVIDIA driver if there is a card",
            )
        ]
    names = ", ".join(card.name for card in present)
    if cuda is None:
        return [
            Finding(
                PROBLEM,
                "gpu",
                f"{names}, but torch is a CPU build",
                "install torch from its CUDA index (pip install torch)",
            )
        ]
    found = [Finding(OK, "gpu", f"{names}; torch for CUDA {cuda}")]
    least = DRIVERS.get(numbers(cuda)[0])
    driver = present[0].driver
    if least is not None and numbers(driver)[:2] < least:
        text = f"{driver} is older than {least[0]}.{least[1]:02}, which CUDA {cuda} needs"
        found.append(
            Finding(
                PROBLEM, "driver", text, "update the driver, or install torch for an older CUDA"
            )
        )
    else:
        found.append(Finding(OK, "driver", f"{driver} runs CUDA {cuda}"))
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        len(present)
        if hidden is None
        else len([part for part in hidden.split(",") if part.strip() not in ("", "-1")])
    )
    if hidden is not None:
        found.append(
            Finding(
                NOTE, "gpu", f"CUDA_VISIBLE_DEVICES={hidden} leaves {visible} of {len(present)}"
            )
        )
    if len({card.name for card in present}) > 1:
        found.append(
            Finding(
                NOTE,
                "gpu",
                "cards of different kinds: every update waits for the slowest",
                "choose with CUDA_VISIBLE_DEVICES",
            )
        )
    found += _precision(config, present)
    ranks = config.batch.ranks
    if ranks is not None and ranks > visible and config.execution.backend != "gloo":
        text = f"batch.ranks = {ranks}, but {visible} GPUs are visible"
        found.append(
            Finding(
                PROBLEM,
                "ranks",
                text,
                f"batch.ranks={max(visible, 1)}; rows an update stay with batch.rows_per_update",
            )
        )
    return found + _memory(config, present, ranks or max(visible, 1))


def _precision(config: Config, present: Sequence[Present]) -> list[Finding]:
    asked = config.execution.precision
    without = [
        card.name for card in present if card.capability is not None and card.capability < (8, 0)
    ]
    unknown = [card.name for card in present if card.capability is None]
    if asked == "bf16" and without:
        return [
            Finding(
                PROBLEM,
                "bf16",
                f"{', '.join(without)} has no bf16 units",
                "execution.precision=fp16",
            )
        ]
    if unknown:
        return [
            Finding(
                NOTE, "bf16", f"nvidia-smi does not say whether {', '.join(unknown)} has bf16 units"
            )
        ]
    if asked == "fp16" and not without:
        return [
            Finding(
                NOTE,
                "bf16",
                "execution.precision = fp16, though every card has bf16",
                "execution.precision=bf16 needs no loss scale",
            )
        ]
    return [Finding(OK, "bf16", f"execution.precision = {asked} runs on every card")]


def _memory(config: Config, present: Sequence[Present], ranks: int) -> list[Finding]:
    try:
        config, _ = planned_engine(config)
    except ValueError:
        return []  # check_engine says why
    shapes, why = shapes_of(config.model.id)
    if shapes is None:
        return [Finding(NOTE, "memory", f"not predicted: {why}")]
    found = []
    for number, card in enumerate(present):
        if card.gpu is None:
            found.append(
                Finding(
                    NOTE,
                    "memory",
                    f"{card.name} is not in glassloop's table: nothing is predicted for it",
                )
            )
            continue
        try:
            rows = config.batch.accumulation_for(ranks) * config.batch.size * ranks
        except ValueError as error:
            return [Finding(PROBLEM, "batch", str(error))]
        engine = config.execution.engine
        if engine not in PROFILES:
            found.append(
                Finding(
                    NOTE,
                    "memory",
                    f"GPU {number}: what execution.engine={engine} needs is not modelled; "
                    "preflight measures it",
                )
            )
            continue
        work = work_of(config, shapes, share=rows // ranks * config.data.max_tokens)
        one = verdict(
            card.gpu,
            shapes,
            work,
            ranks=ranks,
            rows_per_update=rows,
            free_gib=card.free_gib,
            engine=engine,
        )
        text = (
            f"GPU {number}: about {one.needed_gib:.1f} GiB needed for full rows, "
            f"{card.free_gib:.1f} of {card.total_gib:.1f} free"
        )
        text += f" ({one.tiers})" if one.tiers else ""
        if one.fits:
            found.append(Finding(OK, "memory", text))
        else:
            found.append(
                Finding(
                    PROBLEM, "memory", text, one.cure or "free the card, or lower data.max_tokens"
                )
            )
    return found
