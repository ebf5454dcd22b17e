"""Watch a run in the terminal, also over SSH."""

from __future__ import annotations

import time
from pathlib import Path

from glassloop.config.options import Options


def main(argv: list[str]) -> int:
    """Show RUN until it ends.

    Exit code 1 if it failed, else 0; 0 after Ctrl-C.
    """
    own = Options(
        prog="glassloop watch",
        allow_abbrev=False,
        description="Watch a run. It reads the run's folder alone, so it may be started and left "
        "at any time, on any machine that sees the folder. It prints one screen if the output is "
        "no terminal.",
    )
    own.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run: running, finished or failed"
    )
    own.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between two looks (default: 1)",
    )
    own.add_argument("--once", action="store_true", help="print one screen and leave")
    given = own.parse_args(argv)
    if not given.every >= 0.1:
        raise ValueError(f"--every {given.every:g}: at least 0.1 seconds")

    from rich.live import Live

    from glassloop.report.compare_text import console
    from glassloop.report.following import Watched
    from glassloop.report.watching import Screen

    watched, out = Watched(given.run), console()
    watched.refresh()
    if given.once or not out.is_terminal or watched.end is not None:
        out.print(Screen(watched))
    else:
        try:
            with Live(Screen(watched), console=out, auto_refresh=False, screen=False) as live:
                while watched.end is None:
                    time.sleep(given.every)
                    watched.refresh()
                    live.update(Screen(watched), refresh=True)
        except KeyboardInterrupt:
            return 0
    return 1 if watched.end is not None and watched.end["kind"] == "failed" else 0
