"""`glassloop bench --card`: one fixed piece of work and its speed.

The line says how fast the work was and on what. The name carries a version: a change of anything in
WORK makes a new one, so that lines of one name compare. No torch.
"""

from __future__ import annotations

from typing import Any

from glassloop.bench.processes import Place
from glassloop.bench.results import relative
from glassloop.bench.spec import Spec
from glassloop.predict.cards import verdict
from glassloop.predict.fused_time import fused_pass_time
from glassloop.predict.hardware import gpu_named
from glassloop.predict.roofline import (
    ALL_SEVEN,
    RATES,
    pass_time,
    tokens_per_s,
)
from glassloop.predict.shapes import KNOWN
from glassloop.predict.terms import Work
from glassloop.predict.tiers import Tiers
from glassloop.predict.time_checks import errors

NAME = "card-v1"
# Loss of update 1, nats a token, one card: weights and rows are the same bits everywhere, so
# another value is another computation. None: not yet
# measured. Another workload, model or row count a rank is another name, with a value of its own.
EXPECTED_LOSS_NATS: float | None = 12.5909
LOSS_TOLERANCE = 2e-3  # relative: what bf16's kernels may differ from card to card
TIME_LIMIT_S = 180.0
ROWS_PER_RANK = 8
WORK: dict[
    str, Any
    # the recipe at full length: 2 rows of 2,048 tokens a pass, 4 passes an update, activations
    # recomputed
] = {
    "engine": "peft",
    "workload": "full-v1",
    "layout": "literal",
    "batch": 2,
    "model": "random:llama-8b",
    "precision": "bf16",
    "checkpointing": True,
    "r": 16,
    "warmup": 1,
    "updates": 4,
}


def card_spec(place: Place, ranks: int) -> Spec:
    """The work on `ranks` cards: as much for each as for one.

    Raises ValueError where they are not there.
    """
    if place.device != "cuda" or place.gpus == 0:
        raise ValueError(
            "--card measures a GPU, and torch sees none here. Look at nvidia-smi and at whether "
            "torch is a CUDA build (python -c 'import torch; print(torch.version.cuda)'). What "
            "cards are predicted to reach: glassloop bench --predict"
        )
    if ranks > place.gpus:
        raise ValueError(
            f"--ranks {ranks}: torch sees {place.gpus} GPU{'s' * (place.gpus > 1)} here"
        )
    return Spec(ranks=ranks, rows_per_update=ROWS_PER_RANK * ranks, device="cuda", **WORK)


def card_line(line: dict[str, Any]) -> str:
    """The line to paste, from an arm's result."""
    card, machine, cell = line["card"], line["machine"], line["cell"]
    before, during = card["before"] or {}, card["during"] or {}
    name = machine["gpus"][0]["name"] if machine["gpus"] else "unknown card"
    packages, git = machine["packages"], machine["git"] or {}
    commit = (
        f"{git['commit'][:9]}{'+changes' if git.get('changed') else ''}"
        if git
        else f"glassloop {machine['glassloop']}"
    )
    reasons = during.get("throttle")
    throttle = "unknown" if reasons is None else ", ".join(reasons) or "none"
    lowest = during.get("sm_mhz_lowest")
    link = (
        f"PCIe gen{_or(before.get('pcie_generation'))} "
        f"(max {_or(before.get('pcie_generation_max'))}) x{_or(before.get('pcie_width'))}"
    )
    p2p = {True: "yes", False: "no", None: "one card"}[card.get("p2p")]
    versions = " ".join(f"{short} {packages.get(long)}" for short, long in SHORT.items())
    speed, mfu = line["tokens_per_s_per_rank"]["real"], (line.get("flops") or {}).get("mfu")
    peak, frugal = line["peak"]["allocated_gib"], (line.get("energy") or {}).get("tokens_per_joule")
    return " | ".join(
        [
            NAME,
            f"{cell['ranks']} x {name}",
            f"{_or(before.get('power_limit_w'))} W",
            f"SM {_or(during.get('sm_mhz'))} MHz (lowest {_or(lowest)}), memory "
            f"{_or(during.get('memory_mhz'))} MHz",
            f"throttle: {throttle}",
            link,
            f"P2P {p2p}",
            f"driver {machine['driver'] or '?'} cuda {machine['cuda']}",
            versions,
            commit,
            f"{speed:,.0f} tokens/s per GPU",
            f"{'?' if peak is None else f'{peak:.2f}'} GiB",
            f"MFU {'?' if mfu is None else f'{mfu:.1%}'}",
            f"{f'{1 / frugal:.3f}' if frugal else '?'} J/token",
            f"loss {line['update_1']['loss_nats']:.4f} ({loss_verdict(line)})",
        ]
    )


def loss_verdict(line: dict[str, Any], expected: float | None = EXPECTED_LOSS_NATS) -> str:
    """Judge update 1's loss: as expected, or different.

    More ranks have more rows, and so another loss.
    """
    if expected is None or line["cell"]["ranks"] != 1:
        return "nothing to compare with"
    off = relative(line["update_1"]["loss_nats"], expected)
    if off is not None and off <= LOSS_TOLERANCE:
        return "as expected"
    return f"DIFFERS from {expected:.4f}: do not trust this card's numbers before you know why"


SHORT = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "bnb": "bitsandbytes",
    "accelerate": "accelerate",
}


def _or(value: Any) -> str:
    return "?" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def predicted() -> dict[str, float]:
    """Real tokens/s per GPU that arithmetic gives the work, by card's key."""
    shapes, passes, found = KNOWN[WORK["model"]], ROWS_PER_RANK // WORK["batch"], {}
    for key in RATES:
        one = pass_time(shapes, key, rows=WORK["batch"], row_tokens=2048, supervised_share=0.8)
        assert one is not None
        found[key] = tokens_per_s(one, rows=WORK["batch"], row_tokens=2048, passes=passes, ranks=1)
    return found


def predictions(measured: dict[str, float]) -> list[str]:
    """Tokens/s per GPU by card: measured if known, else predicted.

    `measured`: card's key -> tokens/s. Each number says which of the two it is.
    """
    lines = [f"| card | {NAME}: real tokens/s per GPU | where from |", "| --- | --- | --- |"]
    for key, fast in predicted().items():
        if key in measured:
            lines.append(f"| {key} | {measured[key]:,.0f} | measured (predicted: {fast:,.0f}) |")
        else:
            lines.append(
                f"| {key} | {fast:,.0f} | PREDICTED by arithmetic; this work was not measured "
                "there |"
            )
    return [*lines, "", *fused_predictions()]


def fused_predictions() -> list[str]:
    """Predict the same rows through execution.engine=fused.

    Once with as much memory as a card has, once with the least that works.
    """
    shapes = KNOWN[WORK["model"]]
    off = [error for _, _, error in errors("fused")]
    lines = [
        "The same rows with execution.engine=fused, PREDICTED; where this was checked (H100) it "
        f"was {min(off):+.0%} to {max(off):+.0%} off",
        "",
        "| card | memory.profile | layers kept, held in 16 bits | GiB | real tokens/s per GPU |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key in RATES:
        gpu = gpu_named(key)
        assert gpu is not None
        for profile in ("fill", "min"):
            work = Work(
                WORK["batch"],
                2048,
                WORK["r"],
                ALL_SEVEN,
                round(0.8 * WORK["batch"] * 2048),
                profile=profile,
            )
            one = verdict(gpu, shapes, work, ranks=1, rows_per_update=ROWS_PER_RANK, engine="fused")
            assert one.kept is not None
            assert one.held is not None
            time = fused_pass_time(
                shapes,
                key,
                rows=WORK["batch"],
                row_tokens=2048,
                supervised_share=0.8,
                tiers=Tiers(one.kept, held=one.held),
            )
            assert time is not None
            fast = tokens_per_s(
                time,
                rows=WORK["batch"],
                row_tokens=2048,
                passes=ROWS_PER_RANK // WORK["batch"],
                ranks=1,
            )
            lines.append(
                f"| {key} | {profile} | {one.kept}, {one.held} | {one.needed_gib:.1f} | "
                f"{fast:,.0f} |"
            )
    return lines


def comparable(line: dict[str, Any]) -> bool:
    """True if a line did this very work.

    On one card, with the expected loss.
    """
    if line.get("card_name") != NAME or "failed" in line:
        return False
    if not line.get("check", {"within": True})["within"]:
        return False
    return line["cell"]["ranks"] == 1 and card_key(line) is not None


def card_key(line: dict[str, Any]) -> str | None:
    """The card's key in predict/hardware.py; None for one that is not there."""
    gpus = line["machine"]["gpus"]
    gpu = gpu_named(gpus[0]["name"]) if gpus else None
    return None if gpu is None else gpu.key


def measured_cards(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Best tokens/s per GPU by card's key, of comparable lines."""
    found: dict[str, float] = {}
    for line in lines:
        key = card_key(line) if comparable(line) else None
        if key is not None:
            found[key] = max(found.get(key, 0.0), line["tokens_per_s_per_rank"]["real"])
    return found
