"""Draw a run's curves as one picture, with matplotlib."""

from __future__ import annotations

import importlib
import importlib.util
import math
from pathlib import Path
from typing import Any

from glassloop.record.reading import RunData, number, setting

# Those of the page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa3f86", "#8a6d00", "#3d8fc4", "#5b5b5b", "#7a4a1f")


def write_png(run: RunData, path: Path) -> None:
    """Draw loss, gradient norm, learning rate and tokens.

    Raises ValueError if matplotlib is missing or no update is on record.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--png {path} needs matplotlib, which is not installed: pip install "
            "'glassloop[report]'"
        )
    if not run.updates:
        raise ValueError(
            f"--png {path}: {run.folder} has no update on record yet, so there is no curve to draw"
        )
    figure_module: Any = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(10, 8), layout="constrained")
    loss, norm, lr, tokens = figure.subplots(2, 2).ravel()
    _draw_losses(run, loss, norm)
    _draw_tokens(run, lr, tokens)
    marked = [
        record["update"]
        for record in run.updates
        if record["alarms"] or record["action"] == "skipped"
    ]
    for axes in (loss, norm, lr, tokens):
        axes.set_xlabel("update")
        axes.grid(color="#e6e9ed")
        for update in marked:
            axes.axvline(update, color="#c2410c", linewidth=0.8, alpha=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(f"{run.name}{': alarms and skipped updates in orange' if marked else ''}")
    figure.savefig(path, dpi=110, format="png")


def _draw_losses(run: RunData, loss: Any, norm: Any) -> None:
    for axes, field, own, title in (
        (loss, "loss_nats", "rank_loss_nats", "Loss, nats per supervised token"),
        (norm, "grad_norm_pre_clip", "rank_grad_norm", "Gradient norm, L2, before clipping"),
    ):
        for rank in range(run.ranks if run.ranks > 1 else 0):
            shares = [record.get(own) for record in run.updates]
            _draw(
                run,
                axes,
                [None if share is None or rank >= len(share) else share[rank] for share in shares],
                f"rank {rank}",
                rank + 1,
                0.8,
                "--",
            )
        _draw(run, axes, [record[field] for record in run.updates], "all ranks", 0, 2.0)
        axes.set_title(title)
    points = [(one["update"], number(one["loss_nats"])) for one in run.evaluations]
    if points:
        loss.plot(*zip(*points, strict=True), "o:", color="#16191d", label="held-out rows")
    limit = setting(run.config, "optimizer.max_grad_norm")
    if limit:
        norm.axhline(limit, color="#565f6a", linestyle=":", label=f"clipped above {limit:g}")
    for axes in (loss, norm):
        values = [
            value for line in axes.get_lines() for value in line.get_ydata() if math.isfinite(value)
        ]
        if values and min(values) > 0 and max(values) / min(values) > 8:  # as on the page
            axes.set_yscale("log")


def _draw_tokens(run: RunData, lr: Any, tokens: Any) -> None:
    _draw(run, lr, [record["lr"] for record in run.updates], "applied", 0, 1.6)
    lr.set_title("Learning rate, as applied")
    _draw(
        run,
        tokens,
        [sum(record["rank_slot_tokens"]) for record in run.updates],
        "slots, padding included",
        6,
        1.0,
        ":",
    )
    _draw(run, tokens, [sum(record["rank_real_tokens"]) for record in run.updates], "real", 0, 1.4)
    _draw(
        run,
        tokens,
        [record["supervised_tokens"] for record in run.updates],
        "supervised",
        2,
        1.4,
        "--",
    )
    tokens.set_title("Tokens an update, all ranks")


def _draw(
    run: RunData,
    axes: Any,
    values: list[Any],
    name: str,
    colour: int,
    width: float = 1.0,
    style: str = "-",
) -> None:
    """A curve over the run's updates; nothing without a finite value."""
    numbers = [math.nan if value is None else float(value) for value in values]
    if any(map(math.isfinite, numbers)):
        axes.plot(
            [record["update"] for record in run.updates],
            numbers,
            style,
            label=name,
            color=COLOURS[colour % len(COLOURS)],
            linewidth=width,
        )
