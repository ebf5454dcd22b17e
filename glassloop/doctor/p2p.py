"""Test of GPU-to-GPU communication by a small all-reduce with a deadline.

`try_all_reduce` starts its processes, each as
`python -m glassloop.doctor.p2p RANK RANKS BACKEND FILE`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glassloop.doctor.children import environment_of_child

MIB = 4
LIMIT_S = 30.0
CURES = (
    {"NCCL_P2P_DISABLE": "1"},
    {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"},
)  # tried in this order where it fails


@dataclass(frozen=True)
class Answer:
    """Outcome of an all-reduce.

    Attributes:
        outcome: "ok", "hang" or "failed".
        seconds: of the all-reduce itself for ok, waited otherwise.
        text: what a failed process said.
    """

    outcome: str
    seconds: float
    text: str = ""


def try_all_reduce(
    backend: str = "nccl",
    *,
    ranks: int = 2,
    limit_s: float = LIMIT_S,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """All-reduce 4 MiB between `ranks` processes and check the sum.

    They are killed when `limit_s` is over, whatever they wait for.
    """
    with tempfile.TemporaryDirectory(prefix="glassloop-p2p-") as folder:
        command = [sys.executable, "-m", "glassloop.doctor.p2p"]
        around = environment_of_child(**{"OMP_NUM_THREADS": "1", **(environment or {})})
        started = time.monotonic()
        processes = []
        outputs = [Path(folder) / f"out{rank}" for rank in range(ranks)]
        try:
            for rank, output in enumerate(outputs):
                with open(output, "w", encoding="utf-8") as handle:
                    words = [*command, str(rank), str(ranks), backend, str(Path(folder) / "store")]
                    processes.append(
                        subprocess.Popen(
                            words,
                            stdout=handle,
                            stderr=subprocess.STDOUT,
                            env=around,
                            start_new_session=True,
                        )
                    )
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break  # one failed: the other would wait for it
                if time.monotonic() - started > limit_s:
                    return Answer("hang", limit_s)
                time.sleep(0.05)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # a session of its own: nothing else is in the group
                process.wait()
        waited = time.monotonic() - started
        for process, output in zip(processes, outputs, strict=True):
            if process.returncode:
                said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                if said:
                    return Answer("failed", waited, said[-1][:300])
        if any(process.returncode for process in processes):
            return Answer("failed", waited, "a process ended without a word")
        return Answer("ok", float(outputs[0].read_text(encoding="utf-8").split()[-1]))


def find_cure(backend: str = "nccl", limit_s: float = LIMIT_S) -> dict[str, str] | None:
    """Find the first of CURES under which the all-reduce works."""
    return next(
        (
            cure
            for cure in CURES
            if try_all_reduce(backend, limit_s=limit_s, environment=cure).outcome == "ok"
        ),
        None,
    )


def _one(rank: int, ranks: int, backend: str, store: str) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    values = torch.full((MIB << 18,), float(rank + 1), device=device)  # MIB of fp32
    dist.all_reduce(values)  # the first one sets connections up
    started = time.perf_counter()
    dist.all_reduce(values)
    total = float(values[-1])  # waits for the device
    seconds = time.perf_counter() - started
    expected = ranks * (ranks + 1) / 2 * ranks
    dist.destroy_process_group()
    if total != expected:
        raise SystemExit(f"the all-reduce gave {total}, not {expected}")
    print(seconds)


if __name__ == "__main__":
    _one(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
