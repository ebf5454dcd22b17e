"""What reading the machine and recording collectives cost, apart from any model.

    PYTHONPATH=. python benchmarks/added_cost.py [--out FILE]

`sampler`: processor time of the sampler in an update of 300 ms, its thread and the main thread's
part. With a card NVML is asked, else the stand-in of the tests, so that a CPU shows all but the
driver's own time. `recorder`: time of an exchange as large as the gate between two ranks, with
torch's flight recorder and without. record_cost.py adds both to its own line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import torch
from fake_nvml import FakeNvml
from lines import tell

from glassloop.config.sections import RecordConfig
from glassloop.disk.environment import environment
from glassloop.formula.dist import NUMBERS
from glassloop.health.machine import FIELDS, Sampler, cuda_allocations, pause_s
from glassloop.health.nvml import NvmlCard, open_card

UPDATE_S = 0.3
MOST = 0.002  # of an update
READINGS, UPDATES = 400, 400
EXCHANGES, TURNS = 2000, 5
RANKS = 2


def sampler_cost() -> dict[str, Any]:
    """Processor seconds of the sampler an update, on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card: NvmlCard | None = NvmlCard(FakeNvml(), "GPU-a")
    if device.type == "cuda":
        card, why = open_card(str(torch.cuda.get_device_properties(0).uuid))
        if card is None:
            return {"failed": why}
    every_s = RecordConfig().machine_every_s
    assert every_s is not None
    sampler = Sampler(card, every_s, allocations=cuda_allocations(device))
    sampler.read_once()
    began = time.thread_time()
    for _ in range(READINGS):
        sampler.read_once()
    reading_s = (time.thread_time() - began) / READINGS
    began = time.thread_time()
    for _ in range(UPDATES):
        sampler.begin()
        sampler.take()
    main_s = (time.thread_time() - began) / UPDATES
    pause = pause_s(every_s, reading_s)
    update_s = main_s + reading_s * UPDATE_S / pause
    return {
        "card": "NVML" if device.type == "cuda" else "stand-in",
        "every_s": pause,
        "cpu_s_a_reading": reading_s,
        "cpu_s_of_the_main_thread_an_update": main_s,
        "cpu_s_an_update": update_s,
        "share_of_an_update": update_s / UPDATE_S,
        "most": MOST,
        "held": update_s / UPDATE_S <= MOST,
    }


def recorder_cost() -> dict[str, Any]:
    """Seconds of an exchange with the flight recorder and without, taking turns."""
    found: dict[str, list[float]] = {"0": [], "256": []}
    for turn in range(TURNS):
        for size in ("0", "256") if turn % 2 else ("256", "0"):
            found[size].append(_exchange_s(size))
    without, recorded = (statistics.median(found[size]) for size in ("0", "256"))
    return {
        "backend": "nccl" if torch.cuda.device_count() >= RANKS else "gloo",
        "seconds_an_exchange": found,
        "costs_s_an_exchange": recorded - without,
    }


def _exchange_s(size: str) -> float:
    """Median time of an exchange of two fresh ranks; `size` of TORCH_FR_BUFFER_SIZE."""
    with tempfile.TemporaryDirectory(prefix="glassloop-added-") as folder:
        words = [sys.executable, __file__, "--exchange", str(Path(folder) / "meet")]
        env = os.environ | {"TORCH_FR_BUFFER_SIZE": size, "NCCL_NVLS_ENABLE": "0"}
        ranks = [
            subprocess.Popen([*words, str(rank)], env=env, stdout=subprocess.PIPE, text=True)
            for rank in range(RANKS)
        ]
        try:
            told = [one.communicate(timeout=120)[0] for one in ranks]
        finally:
            for one in ranks:
                one.kill()
                one.wait()
    return max(float(text) for text in told)


def exchange(meet: str, rank: int) -> None:
    """Be one of the two ranks; print the median time of an exchange."""
    cards = torch.cuda.device_count() >= RANKS
    device = torch.device("cuda", rank) if cards else torch.device("cpu")
    torch.distributed.init_process_group(
        "nccl" if cards else "gloo", init_method=f"file://{meet}", rank=rank, world_size=RANKS
    )
    own = torch.ones(len(NUMBERS) + 1 + len(FIELDS), dtype=torch.float64, device=device)
    into = [torch.empty_like(own) for _ in range(RANKS)]
    times = []
    for _ in range(EXCHANGES):
        began = time.perf_counter()
        torch.distributed.all_gather(into, own)
        into[0][0].item()
        times.append(time.perf_counter() - began)
    print(statistics.median(times[EXCHANGES // 10 :]))
    torch.distributed.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a line is added to it")
    parser.add_argument("--exchange", nargs=2, metavar=("FILE", "RANK"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.exchange:
        exchange(asked.exchange[0], int(asked.exchange[1]))
        return 0
    result = {
        "what": "added_cost",
        "sampler": sampler_cost(),
        "recorder": recorder_cost(),
        "environment": environment(["added_cost.py"]),
    }
    tell(result, asked.out)
    return 0 if result["sampler"].get("held") else 1


if __name__ == "__main__":
    sys.exit(main())
