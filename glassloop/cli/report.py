"""Write a run as one HTML page that opens offline."""

from __future__ import annotations

from pathlib import Path

from glassloop.config.options import Options


def main(argv: list[str]) -> int:
    """Write the page of RUN.

    Exit code 0; ValueError for what cannot be read.
    """
    own = Options(
        prog="glassloop report",
        allow_abbrev=False,
        description="Write a run's page. It reads the run's folder alone, so it needs no GPU, no "
        "model and no network, and works during the run. A run writes the same page when it ends.",
    )
    own.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    own.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write it (default: RUN/report.html; report-no-text.html with --no-text)",
    )
    own.add_argument(
        "--no-text",
        action="store_true",
        help="to share: no row, answer, system prompt, command line, folder or name of a user",
    )
    own.add_argument(
        "--png", type=Path, metavar="FILE", help="the curves as a picture too (needs matplotlib)"
    )
    given = own.parse_args(argv)

    from glassloop.report.writing import REPORT, write_report

    out = given.out or given.run / ("report-no-text.html" if given.no_text else REPORT)
    path = write_report(given.run, out, text=not given.no_text)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser; it needs no network")
    if given.png:
        from glassloop.record.reading import read_run
        from glassloop.report.png import write_png

        write_png(read_run(given.run), given.png)
        print(given.png)
    return 0
