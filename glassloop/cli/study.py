"""Run a grid of runs, and judge claims against the seeds' spread."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.config.options import Options

if TYPE_CHECKING:
    from glassloop.study.results import CellResult
    from glassloop.study.spec import Cell, Study

SCHEMA = 1


def main(argv: list[str]) -> int:
    """`glassloop study FILE [OPTION] ... [section.field=VALUE] ...`.

    Exit code 0; 1 if a cell has no result; ValueError for a study that cannot run.
    """
    own = Options(
        prog="glassloop study",
        allow_abbrev=False,
        description="Every cell of the grid is a run of its own. A finished cell is not run again: "
        "the same command continues.",
        epilog="Words section.field=VALUE go over the file's base in every cell.",
    )
    own.add_argument("file", metavar="FILE", type=Path, help="the study, such as studies/rank.yaml")
    own.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="runs, results.json and study.html (default: runs/studies/NAME)",
    )
    own.add_argument(
        "--dry-run",
        action="store_true",
        help="print the cells and what each is asked, and run nothing",
    )
    own.add_argument(
        "--only",
        metavar="TEXT",
        help="run only cells whose name has TEXT in it; results are those of all that are done",
    )
    own.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="cells beside each other on a device (default: the file's)",
    )
    own.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end all running cells after M minutes; the next call continues",
    )
    own.add_argument(
        "--again",
        action="store_true",
        help="run cells anew that are done, or were run with another config",
    )
    given, overrides = own.parse_known_args(argv)

    from glassloop.study.spec import cells_of, read_study

    began = time.monotonic()
    for value, name in ((given.parallel, "--parallel"), (given.minutes, "--minutes")):
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value:g}: more than 0")
    study = read_study(given.file, overrides)
    out = given.out or Path("runs") / "studies" / study.name
    cells = cells_of(study, out)
    chosen = [cell for cell in cells if given.only is None or given.only in cell.name]
    if not chosen:
        raise ValueError(
            f"--only {given.only}: no cell has that in its name; there are "
            f"{', '.join(cell.name for cell in cells[:12])}, ..."
        )
    parallel = given.parallel or study.parallel
    if parallel > 1 and "time" in study.measure:
        raise ValueError(
            f"--parallel {parallel}: the study measures time, and cells beside each other slow "
            "each other down; leave it at 1"
        )
    if given.dry_run:
        _show(study, chosen, out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    deadline = None if given.minutes is None else began + 60 * given.minutes
    failed = _run(study, chosen, out, parallel=parallel, again=given.again, deadline=deadline)
    _answer(study, cells, out, deadline=deadline, may_bisect=True)
    return 1 if failed else 0


def _run(
    study: Study,
    cells: Sequence[Cell],
    out: Path,
    *,
    parallel: int,
    again: bool,
    deadline: float | None,
) -> dict[str, str]:
    from glassloop.study.running import run_cells

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)  # so that cells are ended before the study is
    try:
        return run_cells(
            cells,
            out,
            parallel=parallel,
            timeout_s=study.timeout_s,
            say=_say,
            again=again,
            deadline=deadline,
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def _answer(
    study: Study, cells: Sequence[Cell], out: Path, *, deadline: float | None, may_bisect: bool
) -> None:
    """Results, verdicts, page and table of what is on the disk."""
    from glassloop.disk.publish import write_json, write_text
    from glassloop.report.compare_text import console
    from glassloop.study import critical as crit
    from glassloop.study import results as res
    from glassloop.study import verdicts
    from glassloop.study.answers import Answers
    from glassloop.study.answers_text import render
    from glassloop.study.divergence import divergences
    from glassloop.study.page import page, payload

    results = res.read_results(cells, out)
    groups = res.groups_of(results)
    judged = [verdicts.judge(claim, groups, study.seeds) for claim in study.claims]
    critical = crit.critical_of(groups, study.equal) if study.critical else []
    if study.bisect and may_bisect:
        _bisect_first(results, out, deadline)
    diverged = divergences(results, out)
    whole = {
        "schema": SCHEMA,
        "study": study.name,
        "file": study.file,
        "question": study.question,
        "cannot_say": study.cannot_say,
        "words": list(study.words),
        "equal": study.equal,
        "seeds": list(study.seeds),
        "claims": [verdicts.as_plain(one) for one in judged],
        "critical": [crit.as_plain(one) for one in critical],
        "diverged": [vars(one) for one in diverged],
        **res.as_plain(results, groups, out),
    }
    write_json(out / "results.json", whole)
    answers = Answers(study, results, groups, judged, critical, diverged)
    write_text(out / "study.html", page(payload(answers)))
    console().print(render(answers))
    print(
        f"\n{out / 'results.json'}\n{out / 'study.html'}: open it in a browser; it needs no network"
    )


def _bisect_first(results: Sequence[CellResult], out: Path, deadline: float | None) -> None:
    """Bisect the first cell that diverged, if time is left."""
    from glassloop.study.divergence import bisect, divergences
    from glassloop.study.running import environment, first_slot

    found = divergences(results, out)
    left_s = 900.0 if deadline is None else deadline - time.monotonic()
    if found and left_s > 0:
        _say(f"bisecting {found[0].cell}: {found[0].command}")
        bisect(found[0], out, environment(first_slot(), 1), timeout_s=max(10.0, left_s))


def _show(study: Study, cells: Sequence[Cell], out: Path) -> None:
    from glassloop.study.cell_state import state_of
    from glassloop.study.spec import rows_per_update

    print(f"{study.name}: {study.question}\nevery cell: {' '.join(study.words)}")
    for cell in cells:
        schedule = cell.config.schedule
        length = (
            f"{schedule.updates} updates"
            if schedule.updates is not None
            else f"{schedule.epochs:g} epochs"
        )
        state = state_of(cell, out)
        print(
            f"  {cell.name}: "
            f"{', '.join(f'{axis} = {label}' for axis, label in cell.settings.items())}; {length} "
            f"of {rows_per_update(cell.config)} rows, warmup {schedule.warmup_updates}; "
            f"{state.kind}{f' ({state.why})' if state.why else ''}"
        )
    print(f"{len(cells)} cells, {len(study.claims)} claims; results would go to {out}")


def _say(text: str) -> None:
    print(text, flush=True)
