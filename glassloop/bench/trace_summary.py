"""A chrome trace of one update on one page; no torch.

Times in a trace are microseconds. Kernels carry the categories `kernel`, `gpu_memcpy` and
`gpu_memset`; operators `cpu_op`; calls into CUDA `cuda_runtime` and `cuda_driver`; allocations are
instant events named `[memory]`.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

WINDOW = "glassloop update"  # the annotation around the profiled update
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
SHORTEST_GAP_US = 5.0  # kernels that follow each other at once are a few microseconds apart
TOP, TOP_GAPS = 15, 6
NAME, COLUMNS, HEIGHT = 56, 72, 8
MIB, GIB = 2**20, 2**30
KINDS = (  # what a kernel does, by the first pattern in its name
    ("communication", r"nccl"),
    ("copies", r"memcpy|memset|copy_kernel|direct_copy|CatArray"),
    ("dequantise", r"dequant"),
    ("attention", r"flash|fmha|attention|attn"),
    ("matrix products", r"gemm|gemv|cutlass|xmma|nvjet|cublas|wgrad|dgrad"),
    ("optimizer", r"optimizer|adam"),
    ("norm, softmax, sums", r"norm|softmax|reduce"),
    ("elementwise and other", r""),
)


@dataclass(frozen=True)
class Span:
    """An event with a length. Times in microseconds since the window began."""

    name: str
    category: str
    start: float
    length: float
    thread: Any

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True)
class Gap:
    """A time in which the device had nothing to do."""

    start: float
    length: float
    before: str  # what ran last
    after: str  # what came next
    host: str  # what the host was in, at the gap's middle


@dataclass(frozen=True)
class Trace:
    """The parts of a trace that the page needs."""

    length: float  # of the window
    on_gpu: bool
    device: tuple[Span, ...]  # kernels and copies in the window, by start; on a CPU, operators
    host: tuple[Span, ...]  # operators and CUDA calls, by start
    memory: tuple[tuple[float, int], ...]  # (when, bytes allocated then) on the device


def read_trace(file: Path) -> Trace:
    """Raises ValueError for a file without the window."""
    raw = file.read_bytes()
    whole = json.loads(gzip.decompress(raw) if file.suffix == ".gz" else raw)
    return parse_trace(whole["traceEvents"], str(file))


def parse_trace(events: Iterable[dict[str, Any]], where: str = "the trace") -> Trace:
    events = list(events)
    window = next(
        (
            e
            for e in events
            if e.get("ph") == "X" and e.get("name") == WINDOW and e.get("cat") == "user_annotation"
        ),
        None,
    )
    if window is None:
        raise ValueError(
            f"{where} holds no event `{WINDOW}`: it was not written by glassloop bench --profile"
        )
    began, length = float(window["ts"]), float(window["dur"])
    spans = [
        Span(
            e["name"],
            e["cat"],
            float(e["ts"]) - began,
            float(e["dur"]),
            (e.get("pid"), e.get("tid")),
        )
        for e in events
        if e.get("ph") == "X"
        and e.get("cat") in (*ON_DEVICE, *ON_HOST)
        and began <= float(e["ts"]) <= began + length
    ]
    spans.sort(key=lambda span: (span.start, -span.length))
    kernels = [span for span in spans if span.category in ON_DEVICE]
    operators = [span for span in spans if span.category == "cpu_op"]
    kind = 1 if kernels else 0  # torch's number of the device type: CUDA, CPU
    memory = sorted(
        (float(e["ts"]) - began, int(e["args"]["Total Allocated"]))
        for e in events
        if e.get("name") == "[memory]"
        and e["args"].get("Device Type") == kind
        and e["args"].get("Total Allocated", -1) >= 0
        and began <= float(e["ts"]) <= began + length
    )
    host = tuple(span for span in spans if span.category in ON_HOST)
    return Trace(length, bool(kernels), tuple(kernels or operators), host, tuple(memory))


def page(trace: Trace, about: Sequence[str]) -> list[str]:
    """Write the page as lines of Markdown; `about` says what was profiled."""
    busy = union(trace.device)
    worked = sum(end - start for start, end in busy)
    what = "GPU" if trace.on_gpu else "operators"
    idle = trace.length - worked
    head = [
        f"# {about[0]}",
        "",
        *(f"- {line}" for line in about[1:]),
        f"- update: {trace.length / 1e3:,.1f} ms under the profiler, which adds host time of its "
        "own",
        f"- {what} busy: {worked / 1e3:,.1f} ms ({worked / trace.length:.0%}); nothing running: "
        f"{idle / 1e3:,.1f} ms ({idle / trace.length:.0%})",
    ]
    return [*head, "", *_top(trace), "", *_kinds(trace), *_gap_lines(trace), "", *_memory(trace)]


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The times covered by spans that are sorted by start."""
    covered: list[tuple[float, float]] = []
    for span in spans:
        if covered and span.start <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(covered[-1][1], span.end))
        else:
            covered.append((span.start, span.end))
    return covered


def gaps(trace: Trace) -> list[Gap]:
    """Times in the window in which nothing ran, longest first.

    Each has at least SHORTEST_GAP_US.
    """
    found = []
    ends = sorted(trace.device, key=lambda span: span.end)
    end_times, starts = [span.end for span in ends], [span.start for span in trace.device]
    edges = [(0.0, 0.0), *union(trace.device), (trace.length, trace.length)]
    for (_, begin), (end, _) in pairwise(edges):
        if end - begin < SHORTEST_GAP_US:
            continue
        last, following = bisect_right(end_times, begin), bisect_right(starts, end)
        before = ends[last - 1].name if last else "the update's begin"
        after = (
            trace.device[following - 1].name
            if following and starts[following - 1] >= end
            else "the update's end"
        )
        found.append((end - begin, begin, before, after))
    found.sort(key=lambda gap: (-gap[0], gap[1]))
    return [
        Gap(begin, length, before, after, _host_at(trace, begin + length / 2))
        for length, begin, before, after in found
    ]


def _host_at(trace: Trace, when: float) -> str:
    """Name the innermost operator or CUDA call at a time."""
    inside = [span for span in trace.host if span.start <= when < span.end]
    return max(inside, key=lambda span: span.start).name if inside else "Python"


def self_times(spans: Iterable[Span]) -> dict[str, tuple[float, int]]:
    """Name -> (time without what it called, calls), over all threads.

    Spans sorted by start, the longer first.
    """
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    open_spans: dict[Any, list[Span]] = defaultdict(list)
    for span in spans:
        stack = open_spans[span.thread]
        while stack and stack[-1].end <= span.start:
            stack.pop()
        if stack:
            total[stack[-1].name] -= min(span.length, stack[-1].end - span.start)
        stack.append(span)
        total[span.name] += span.length
        calls[span.name] += 1
    return {name: (total[name], calls[name]) for name in total}


def _top(trace: Trace) -> list[str]:
    if trace.on_gpu:
        title, times = "kernels", _sums(trace.device)
    else:
        title, times = "operators, without what they call", self_times(trace.device)
    whole = sum(length for length, _ in times.values())
    order = sorted(times.items(), key=lambda item: -item[1][0])
    lines = [f"## Top {title}", "", "| ms | share | calls | name |", "| ---: | ---: | ---: | --- |"]
    lines += [
        f"| {length / 1e3:,.2f} | {length / whole:.1%} | {calls:,} | {_short(name)} |"
        for name, (length, calls) in order[:TOP]
    ]
    if len(order) > TOP:
        rest = sum(length for _, (length, _) in order[TOP:])
        lines.append(f"| {rest / 1e3:,.2f} | {rest / whole:.1%} | | {len(order) - TOP} others |")
    return lines


def _sums(spans: Iterable[Span]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for span in spans:
        length, calls = found.get(span.name, (0.0, 0))
        found[span.name] = (length + span.length, calls + 1)
    return found


def kind_of(name: str) -> str:
    """Kind of a kernel's work."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def _kinds(trace: Trace) -> list[str]:
    if not trace.on_gpu:
        return []
    sums: dict[str, float] = defaultdict(float)
    for span in trace.device:
        sums[kind_of(span.name)] += span.length
    whole = sum(sums.values())
    parts = sorted(sums.items(), key=lambda item: -item[1])
    return [
        "By kind: " + ", ".join(f"{kind} {length / whole:.0%}" for kind, length in parts) + ".",
        "",
    ]


def _gap_lines(trace: Trace) -> list[str]:
    found = gaps(trace)
    whole = sum(gap.length for gap in found)
    waiting = "GPU waits for the host" if trace.on_gpu else "No operator runs"
    lines = [
        f"## {waiting}",
        "",
        f"{len(found):,} gaps of {SHORTEST_GAP_US:g} us or more, {whole / 1e3:,.1f} ms together. "
        "The longest:",
        "",
        "| ms | at ms | host is in | after | before |",
        "| ---: | ---: | --- | --- | --- |",
    ]
    for gap in found[:TOP_GAPS]:
        names = " | ".join(_short(name, 34) for name in (gap.host, gap.before, gap.after))
        lines.append(f"| {gap.length / 1e3:,.2f} | {gap.start / 1e3:,.1f} | {names} |")
    return lines


def _memory(trace: Trace) -> list[str]:
    """Allocated bytes over the update: the highest of each column."""
    title = f"## Memory allocated on the {'GPU' if trace.on_gpu else 'CPU'}"
    if not trace.memory:
        return [title, "", "The trace holds no allocation."]
    columns = [0] * COLUMNS
    events, level, at = trace.memory, trace.memory[0][1], 0
    for column in range(COLUMNS):
        end = trace.length * (column + 1) / COLUMNS
        highest = level
        while at < len(events) and events[at][0] <= end:
            level = events[at][1]
            highest = max(highest, level)
            at += 1
        columns[column] = highest
    low, high = min(columns), max(columns)
    peak_at = next(when for when, size in events if size == max(size for _, size in events))
    unit, name = (GIB, "GiB") if high >= GIB / 4 else (MIB, "MiB")
    step = (high - low) / HEIGHT or 1
    rows = []
    for row in range(HEIGHT, 0, -1):
        filled = "".join(
            "#" if value > low + (row - 1) * step or row == 1 else " " for value in columns
        )
        rows.append(f"{(low + row * step) / unit:>9.3f} |{filled}")
    scale = f"{'':>11}0{f'{trace.length / 1e3:,.0f} ms':>{COLUMNS - 1}}"
    text = "" if trace.on_gpu else "Counted from where the profiler began: "
    text += (
        f"{events[0][1] / unit:.3f} {name} at first, {high / unit:.3f} at most (after "
        f"{peak_at / 1e3:,.0f} ms), {level / unit:.3f} at last."
    )
    return [title, "", text, "", "```", *rows, scale, "```"]


def _short(name: str, width: int = NAME) -> str:
    """A name without template arguments, fit for a cell of a table."""
    bare = name.removeprefix("void ").replace("|", "/")
    bare = re.sub(r"\((anonymous namespace|[^()]*\*[^()]*)\)(::)?", "", bare)
    return bare if len(bare) <= width else f"{bare[: width - 3]}..."
