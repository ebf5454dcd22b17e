"""A profiled update on one page: a small and a real trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glassloop.bench import trace_summary as summary
from glassloop.bench.profile import SUMMARY, TRACE, profiled

BEGIN = 1000.0  # microseconds


def event(name: str, category: str, start: float, length: float, thread: int = 1) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": BEGIN + start,
        "dur": length,
        "pid": 1,
        "tid": thread,
    }


def memory(when: float, size: int, device: int = 1) -> dict[str, Any]:
    args = {
        "Device Type": device,
        "Device Id": 0,
        "Total Allocated": size,
        "Total Reserved": size,
        "Bytes": 1,
        "Addr": 1,
    }
    return {"ph": "i", "name": "[memory]", "ts": BEGIN + when, "pid": 1, "tid": 1, "args": args}


WINDOW = event(summary.WINDOW, "user_annotation", 0, 1000)
HOST = [
    event("aten::mm", "cpu_op", 0, 300),
    event("aten::empty", "cpu_op", 100, 50),
    event("cudaLaunchKernel", "cuda_runtime", 260, 20),
    event("aten::nonzero", "cpu_op", 700, 290),
    event("cudaStreamSynchronize", "cuda_runtime", 750, 240),
    event("aten::add", "cpu_op", 10, 100, thread=2),
    event("outside", "cpu_op", -500, 100),
]
DEVICE = [
    event("void cutlass::Kernel2<sm80_gemm>", "kernel", 50, 400, 7),
    event("void flash_fwd_kernel<a|b>", "kernel", 450, 100, 7),
    event("ncclDevKernel_AllReduce", "kernel", 500, 100, 8),  # beside the last
    event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 800, 100, 7),
    event("void cutlass::Kernel2<sm80_gemm>", "kernel", 902, 50, 7),
    event("outside", "kernel", 2000, 100, 7),
]
ON_GPU = [
    WINDOW,
    *HOST,
    *DEVICE,
    memory(10, 3 << 30),
    memory(400, 5 << 30),
    memory(600, 4 << 30),
    memory(20, 9 << 30, device=0),
]


def test_busy_time_is_the_union_of_kernels() -> None:
    trace = summary.parse_trace(ON_GPU)
    assert trace.on_gpu and trace.length == 1000 and len(trace.device) == 5
    assert summary.union(trace.device) == [(50, 600), (800, 900), (902, 952)]
    text = "\n".join(summary.page(trace, ["what", "where"]))
    assert "GPU busy: 0.7 ms (70%); nothing running: 0.3 ms (30%)" in text
    assert "# what\n\n- where" in text


def test_gaps_name_what_the_host_was_in() -> None:
    found = summary.gaps(summary.parse_trace(ON_GPU))
    assert [(gap.start, gap.length) for gap in found] == [
        (600, 200),
        (0, 50),
        (952, 48),
    ]  # 900 to 902 is no gap
    longest, first, last = found
    assert (longest.host, longest.before, longest.after) == (
        "aten::nonzero",
        "ncclDevKernel_AllReduce",
        "Memcpy DtoH (Device -> Pinned)",
    )
    assert (first.host, first.before) == (
        "aten::add",
        "the update's begin",
    )  # the innermost, on whatever thread
    assert (last.host, last.after) == ("cudaStreamSynchronize", "the update's end")
    text = "\n".join(summary.page(summary.parse_trace(ON_GPU), ["what"]))
    assert "3 gaps of 5 us or more, 0.3 ms together" in text
    assert (
        "| 0.20 | 0.6 | aten::nonzero | ncclDevKernel_AllReduce | Memcpy DtoH (Device -> Pinned) |"
        in text
    )


def test_kernels_are_ranked_and_told_by_kind() -> None:
    text = "\n".join(summary.page(summary.parse_trace(ON_GPU), ["what"]))
    assert text.index("| 0.45 | 60.0% | 2 | cutlass::Kernel2") < text.index(
        "| 0.10 | 13.3% | 1 | flash_fwd_kernel<a/b>"
    )
    assert "By kind: matrix products 60%, attention 13%, communication 13%, copies 13%." in text
    assert summary.kind_of("kDequantizeBlockwise") == "dequantise"
    assert (
        summary.kind_of("void at::native::vectorized_elementwise_kernel<4>")
        == "elementwise and other"
    )


def test_memory_is_drawn_with_its_peak() -> None:
    lines = summary.page(summary.parse_trace(ON_GPU), ["what"])
    assert "3.000 GiB at first, 5.000 at most (after 0 ms), 4.000 at last." in lines
    rows = [line for line in lines if " |" in line and line.strip()[0].isdigit()]
    assert len(rows) == summary.HEIGHT
    top, bottom = rows[0].partition("|")[2], rows[-1].partition("|")[2]
    assert bottom == "#" * summary.COLUMNS
    assert (
        top.index("#") == 28 and top.rindex("#") == 43
    )  # 400 to 600 of 1000 microseconds, in columns
    assert max(map(len, lines)) <= 150 and len(lines) <= 60


def test_without_kernels_operators_are_ranked_by_their_own_time() -> None:
    trace = summary.parse_trace([WINDOW, *HOST, memory(10, 100, device=0)])
    assert not trace.on_gpu and trace.memory == ((10.0, 100),)
    assert summary.self_times(trace.device) == {
        "aten::mm": (250, 1),
        "aten::empty": (50, 1),
        "aten::nonzero": (290, 1),
        "aten::add": (100, 1),
    }
    text = "\n".join(summary.page(trace, ["what"]))
    assert (
        "operators busy: 0.6 ms (59%)" in text and "Top operators" in text and "By kind" not in text
    )
    assert "| 0.40 | 0.3 | Python | aten::mm | aten::nonzero |" in text


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": HOST}))
    with pytest.raises(ValueError, match=r"trace.json holds no event `glassloop update`"):
        summary.read_trace(file)
    file.write_text(json.dumps({"traceEvents": [WINDOW]}))
    text = "\n".join(summary.page(summary.read_trace(file), ["what"]))
    assert "holds no allocation" in text and "0 ms" in text


def test_a_real_update_leaves_trace_and_page(tmp_path: Path) -> None:
    a = torch.randn(64, 64, requires_grad=True)
    lines = profiled(
        lambda: (a @ a).relu().sum().backward(),
        tmp_path / "p",
        device=torch.device("cpu"),
        about=["a product"],
    )
    events = json.loads(gzip.decompress((tmp_path / "p" / TRACE).read_bytes()))["traceEvents"]
    assert any(one.get("name") == "aten::mm" for one in events)
    assert (tmp_path / "p" / SUMMARY).read_text() == "\n".join(lines) + "\n"
    assert any("aten::mm" in line for line in lines) and any(
        line.endswith("at last.") for line in lines
    )
