"""Results for people: a table, ratios of two files, bars.

Pure functions from lines to text. No torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassloop.bench.results import Arm, arms, rates_of
from glassloop.bench.spec import SAME

HEAD = (
    f"{'engine':<9}{'workload':<11}{'layout':<8}{'rows':>4}{'rk':>3} "
    f"{'act.':<5}{'tok/s':>8}{'/GPU':>8}{'s/update':>9}{'p10-p90':>12}{'GiB':>7}{'MFU':>5}{'J/tok':>6}{'n':>3}"
)
BAR = 48  # characters of the longest bar


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Write measured arms, reasons for missing ones, and scaling over ranks."""
    found = arms(lines)
    shown = (
        [HEAD, *(_row(arm) for arm in found)]
        if found
        else ["no arm was measured and passed its check"]
    )
    return [*shown, *left_out(lines), *scaling(found)]


def _row(arm: Arm) -> str:
    cell = arm.cell
    low, middle, high = (arm.middle("update_s", name) or 0.0 for name in ("p10", "median", "p90"))
    peak, mfu = arm.middle("peak", "allocated_gib"), arm.middle("flops", "mfu")
    frugal = arm.middle("energy", "tokens_per_joule")
    each = arm.tokens_per_s / cell["ranks"]
    return (
        f"{cell['engine'][:8]:<9}{cell['workload'][:10]:<11}{cell['layout'][:7]:<8}"
        f"{cell['batch']:>4}{cell['ranks']:>3} "
        f"{'again' if cell['checkpointing'] else 'kept':<5}{arm.tokens_per_s:>8,.0f}{each:>8,.0f}"
        f"{middle:>9.3f}{f'{low:.2f}-{high:.2f}':>12}{'-' if peak is None else f'{peak:.2f}':>7}"
        f"{'-' if mfu is None else f'{mfu:.0%}':>5}"
        f"{f'{1 / frugal:.3f}' if frugal else '-':>6}{len(arm.rates):>3}"
        + "".join(
            f"  {field.removeprefix('execution.').removeprefix('memory.')}"
            for field in cell.get("varied", ())
        )
    )


def left_out(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Write a line for each result without numbers: not run, failed, unchecked."""
    said = []
    for line in lines:
        check = line.get("check", {})
        if "failed" in line:
            said.append(
                f"{'left out' if line.get('left_out') else 'failed'}: {line['name']}: "
                f"{line['failed'][:600]}"
            )
        elif check.get("within") is None:
            said.append(f"not shown: {line['name']}: {check.get('why', 'it was not checked')}")
        elif not check["within"]:
            said.append(
                f"CHECK FAILED, not shown: {line['name']}: update 1 differs from "
                f"{check['against']}: loss by {check['loss_off']}, norm by {check['norm_off']} "
                f"(relative; at most {check['tolerance']})"
            )
    return said


def scaling(found: Sequence[Arm]) -> list[str]:
    """Efficiency of n ranks: their tokens/s over n times one's.

    Every rank has a card of its own.
    """
    alone = {_without_ranks(arm): arm for arm in found if arm.cell["ranks"] == 1}
    said = []
    for arm in found:
        ranks, one = arm.cell["ranks"], alone.get(_without_ranks(arm))
        if ranks == 1 or one is None:
            continue
        efficiency = arm.tokens_per_s / ranks / one.tokens_per_s
        where = len(arm.lines[0]["machine"]["gpus"])
        name = f"{arm.cell['engine']}, {arm.cell['workload']}, {arm.cell['layout']}: {ranks} ranks"
        if where < ranks:
            said.append(
                f"{name} share {where or 'no'} GPU{'s' * (where != 1)}: a check of results, not of "
                "speed"
            )
            continue
        doubt = (
            "  ABOVE 100 %: look for less work per rank (fewer passes, less padding) or a slow "
            "one-rank arm"
            if efficiency > 1
            else ""
        )
        said.append(f"{name} reach {efficiency:.0%} of {ranks} x one rank{doubt}")
    return said


def beside(lines: Sequence[dict[str, Any]], others: Sequence[str]) -> list[str]:
    """Compare arms that took turns: ours with `others` (engines).

    They share workload and ranks. Written are the ratio of real tokens a second in the same turn,
    as median and range over the turns; peaks; and seconds of all updates, warm-up included, from
    when the model was loaded.
    """
    turned = [
        line
        for line in lines
        if "failed" not in line and line["check"]["within"] and len(line.get("turns", ())) > 1
    ]
    theirs = [line for line in turned if line["cell"]["engine"] in others]
    said = []
    for line in turned:
        if line in theirs:
            continue
        for other in theirs:
            if _place(line) != _place(other):
                continue
            ratios = [one / two for one, two in zip(rates_of(line), rates_of(other), strict=True)]
            peaks = [one["peak"]["allocated_gib"] for one in (line, other)]
            memory = "" if None in peaks else f"; peak {peaks[0]:.2f} and {peaks[1]:.2f} GiB"
            whole = [sum(one["warmup_s"]) + sum(one["update_s"]["all"]) for one in (line, other)]
            count = len(line["warmup_s"]) + len(line["update_s"]["all"])
            said.append(
                f"{line['name']} / {other['cell']['engine']}: {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} turns){memory}; {count} "
                f"updates in {whole[0]:.1f} and {whole[1]:.1f} s"
            )
    return said


def _place(line: dict[str, Any]) -> tuple[Any, ...]:
    """Fields that arms side by side share."""
    return (
        *(line["cell"][name] for name in ("workload", "ranks", "rows_per_update", "model")),
        line["rows_digest"],
        len(line["turns"]),
    )


def _without_ranks(arm: Arm) -> str:
    return repr(sorted((name, value) for name, value in arm.cell.items() if name not in ("ranks",)))


def compare(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], *, anyway: bool
) -> tuple[list[str], bool]:
    """Ratios after / before of arms, and if all had a partner.

    The partner is the same arm, else every arm that does the same work (SAME). Other arms are
    refused with what differs, unless `anyway`.
    """
    old, said, whole = arms(before), [], True
    said.append(
        f"{'arm of B':<44}{'arm of A':<18}{'tok/s A':>9}{'tok/s B':>9}{'B/A':>7}{'GiB B-A':>9}"
    )
    for arm in arms(after):
        partners = [one for one in old if one.key == arm.key] or [
            one for one in old if not differences(one, arm)
        ]
        if partners:
            said += [_ratio(one, arm) for one in partners]
            continue
        whole = False
        for one in sorted(old, key=lambda one: len(differences(one, arm)))[:1]:
            differ = "; ".join(differences(one, arm))
            if anyway:
                said += [_ratio(one, arm), f"    NOT THE SAME WORK: {differ}"]
            else:
                said.append(
                    f"refused: {short(arm)}: nearest is {short(one)}, but {differ} (--anyway "
                    "compares all the same)"
                )
    return said, whole


def differences(one: Arm, other: Arm) -> list[str]:
    """Difference that spoils a ratio of two arms, as `field: this, that`."""
    mine, theirs = ({**arm.cell, "rows_digest": arm.rows_digest} for arm in (one, other))
    return [
        f"{name}: {mine.get(name)} in A, {theirs.get(name)} in B"
        for name in SAME
        if mine.get(name) != theirs.get(name)
    ]


def _ratio(one: Arm, other: Arm) -> str:
    peaks = [arm.middle("peak", "allocated_gib") for arm in (one, other)]
    memory = "-" if peaks[0] is None or peaks[1] is None else f"{peaks[1] - peaks[0]:+.2f}"
    ratio = other.tokens_per_s / one.tokens_per_s
    # Repeats that overlap: the difference may be the machine's own.
    near = (
        one.spread[0] <= other.spread[1] and other.spread[0] <= one.spread[1] and len(one.lines) > 1
    )
    partner = "the same" if one.key == other.key else f"{one.cell['engine']} {one.cell['layout']}"
    return (
        f"{short(other)[:43]:<44}{partner[:17]:<18}{one.tokens_per_s:>9,.0f}{other.tokens_per_s:>9,.0f}{ratio:>7.3f}{memory:>9}"
        f"{'~' * near}"
    )


def short(arm: Arm) -> str:
    """An arm in at most 43 characters, usually."""
    cell = arm.cell
    again = "again" if cell["checkpointing"] else "kept"
    return (
        f"{cell['engine']} {cell['workload']} {cell['layout']} {cell['batch']}x{cell['ranks']} "
        f"{again}"
    )


def bars(named: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[str]:
    """Draw every arm's real tokens a second per rank as bars."""
    values = [
        (name, arm, arm.middle("tokens_per_s_per_rank", "real") or 0.0)
        for name, lines in named
        for arm in arms(lines)
    ]
    longest = max((value for _, _, value in values), default=0.0)
    if not longest:
        return []
    head = "real tokens/s per rank"
    return [
        head,
        *(
            f"{name} {short(arm)[:38]:<38} {'#' * round(value / longest * BAR)} {value:,.0f}"
            for name, arm, value in values
        ),
    ]


def png(named: Sequence[tuple[str, Sequence[dict[str, Any]]]], file: Path) -> None:
    """The bars as a picture. Raises ValueError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--png {file} needs matplotlib, which is not installed: pip install matplotlib, or "
            "read the bars above"
        )
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    values = [
        (f"{name} {short(arm)}", arm.middle("tokens_per_s_per_rank", "real"))
        for name, lines in named
        for arm in arms(lines)
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.35 * len(values)))
    axes.barh([name for name, _ in values], [value for _, value in values])
    axes.invert_yaxis()
    axes.set_xlabel("real tokens/s per rank")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
