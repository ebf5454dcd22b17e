"""Compare runs, with a verdict against the seeds' spread."""

from __future__ import annotations

from pathlib import Path

from glassloop.config.options import Options


def main(argv: list[str]) -> int:
    """Compare the runs.

    Exit code 0; ValueError for what cannot be compared.
    """
    own = Options(
        prog="glassloop compare",
        allow_abbrev=False,
        description="Compare runs. Runs that differ in their seed alone make a side, and each side "
        "is compared with the first. A verdict needs two seeds a side: with one it says "
        "'not resolved'. Two runs of one seed on a side measure the noise floor.",
    )
    own.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folders of two runs or more"
    )
    own.add_argument(
        "--floor",
        type=float,
        metavar="X",
        help="relative difference that counts as noise (default: measured on repeats, else by "
        "precision)",
    )
    own.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write the page (default: compare-A-B.html beside the first run; "
        "compare-A-B-no-text.html with --no-text)",
    )
    own.add_argument("--no-page", action="store_true", help="write no page")
    own.add_argument(
        "--no-text",
        action="store_true",
        help="to share: no row id, system prompt, folder or name of a user, on the page or here",
    )
    given = own.parse_args(argv)
    if given.floor is not None and not 0 < given.floor < 1:
        raise ValueError(f"--floor {given.floor:g}: a relative difference between 0 and 1")

    from glassloop.disk.publish import write_text
    from glassloop.record.reading import read_run
    from glassloop.report.compare_page import comparison_payload
    from glassloop.report.compare_text import console, render
    from glassloop.report.comparing import compare
    from glassloop.report.page import page
    from glassloop.report.sharing import shared

    found = compare([read_run(folder) for folder in given.runs], given.floor)
    console().print(render(shared(found) if given.no_text else found))
    if not given.no_page:
        names = "-".join(run.name for run in (found.runs[0], found.runs[-1]))
        names += "-no-text" if given.no_text else ""
        out = given.out or given.runs[0].resolve().parent / f"compare-{names}.html"
        write_text(out, page(comparison_payload(found, text=not given.no_text)))
        print(f"\n{out}: open it in a browser; it needs no network")
    return 0
