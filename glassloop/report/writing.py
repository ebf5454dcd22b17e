"""Write a run's page into its folder."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path

from glassloop.disk.publish import write_text
from glassloop.record.reading import read_run
from glassloop.report.page import page
from glassloop.report.payload import payload

REPORT = "report.html"


def write_report(folder: Path, out: Path | None = None, *, text: bool = True) -> Path:
    """Publish the page of a run.

    It lies in the run's folder unless `out` says where. Raises ValueError or OSError as read_run
    and the disk do.
    """
    out = out or folder / REPORT
    write_text(out, page(payload(read_run(folder), text=text)))
    return out


def attachment(folder: Path, text: bool) -> tuple[str, str] | None:
    """Make page and Markdown summary of a run, for trackers.

    None if it cannot be made: that is said and changes nothing.

    Args:
        text: as in `payload`.
    """
    try:
        data = payload(read_run(folder), text=text)
        lines = [f"- **{one['verdict']}** {one['text']}" for one in data["summary"]]
        return page(data), "\n".join([f"### {data['title']}", "", *lines])
    except Exception as error:  # as below
        _say_failure(f"report of {folder} not sent: {type(error).__name__}: {error}")
        return None


def report_at_the_end(folder: Path) -> None:
    """Write the page of a run that has just ended.

    Whatever goes wrong is said and changes nothing: the run is over.
    """
    started = time.perf_counter()
    try:
        if not (folder / "events.jsonl").exists():  # refused before it had a folder
            return
        path = write_report(folder)
        print(
            f"report {path} ({path.stat().st_size / 1e6:.1f} MB, "
            f"{time.perf_counter() - started:.1f} s)",
            flush=True,
        )
    except Exception as error:  # a fault of the page must not become one of the run
        _say_failure(
            f"report of {folder} not written: {type(error).__name__}: {error}\n    type: glassloop "
            f"report {shlex.quote(str(folder))}"
        )


def _say_failure(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the screen is what has gone
        print(line, file=sys.stderr, flush=True)
