"""One update under torch's profiler: a chrome trace and a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from glassloop.bench.trace_summary import WINDOW, page, read_trace

TRACE, SUMMARY = "trace.json.gz", "summary.md"


def profiled(
    work: Callable[[], object], folder: Path, *, device: torch.device, about: Sequence[str]
) -> list[str]:
    """Do the work once; write TRACE and SUMMARY, return the page's lines.

    `work` has to wait for the device.

    Open the trace in https://ui.perfetto.dev or chrome://tracing. The profiler adds some
    microseconds of host time to each operator: where the host is the limit, the update is slower
    than without it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with (
        profile(activities=activities, profile_memory=True, acc_events=True) as profiler,
        record_function(WINDOW),
    ):
        work()
    profiler.export_chrome_trace(str(folder / TRACE))
    lines = page(read_trace(folder / TRACE), about)
    (folder / SUMMARY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
