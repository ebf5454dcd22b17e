"""What fits on a smaller card.

The rest of a large one's memory is held by this process while `glassloop bench` runs beside it.

    python benchmarks/small_card.py --gib 23.5 --engines fused --workloads full-v1 --layouts literal
    --vary memory.profile=min,fill --out FILE

The arms find no more free memory than --gib, so `fill` chooses what it would choose there, and what
does not fit runs out. Speeds are those of the large card. All further words go to `glassloop
bench`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

GIB = 2**30
SLACK = 2**26  # allocations are rounded


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--gib",
        type=float,
        default=23.5,
        help="left free; a card of 24 GB has about 23.5 (default)",
    )
    given, words = parser.parse_known_args()
    if not torch.cuda.is_available():
        raise SystemExit("small_card.py holds a GPU's memory: there is no CUDA GPU here")
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context is there before the free memory is read
    free = torch.cuda.mem_get_info()[0]
    if free < given.gib * GIB:
        raise SystemExit(f"--gib {given.gib:g}: only {free / GIB:.1f} GiB are free on this card")
    held = torch.empty(
        max(0, int(free - given.gib * GIB) - SLACK), dtype=torch.uint8, device="cuda"
    )
    print(
        f"held {held.numel() / GIB:.1f} GiB, left free {torch.cuda.mem_get_info()[0] / GIB:.2f} "
        "GiB",
        flush=True,
    )
    return subprocess.run(
        [sys.executable, "-m", "glassloop.cli", "bench", *words], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
