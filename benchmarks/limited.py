"""A run on a part of a large card: torch may take --gib of it, and finds no more free.

    accelerate launch --num_processes 2 benchmarks/limited.py --gib 11.2 r1_70b_scam WORDS...

Speeds are those of the large card. What torch's allocator does not see, such as the CUDA context,
is outside of the limit. All further words go to train_loop.py.
"""

from __future__ import annotations

import os
import sys

import torch

GIB = 2**30


def limit(gib: float) -> None:
    """Let this rank take so much of its card, and find the rest taken."""
    genuine = torch.cuda.mem_get_info

    def mem_get_info(device: object = None) -> tuple[int, int]:
        free, _ = genuine(device)  # pyright: ignore[reportArgumentType]
        most = int(gib * GIB)
        return max(0, min(free, most - torch.cuda.memory_reserved(device))), most  # pyright: ignore[reportArgumentType]

    torch.cuda.mem_get_info = mem_get_info
    index = int(os.environ.get("LOCAL_RANK", "0"))
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, index)


def main() -> int:
    at = sys.argv.index("--gib")
    gib, words = float(sys.argv[at + 1]), sys.argv[1:at] + sys.argv[at + 2 :]
    limit(gib)
    import train_loop

    return train_loop.main(words)


if __name__ == "__main__":
    sys.exit(main())
