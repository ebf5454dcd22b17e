"""The host's cost of a launch: by Triton's launcher, and of the compiled kernel alone.

    python benchmarks/launch_cost.py

No card is needed: the launch itself does nothing, so what is measured is Python before it. What a
direct launch could save is the difference, less the key by which it would find the kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def microseconds(action: Callable[[], object], repeats: int) -> float:
    """CPU time of one call, the least of five rounds."""
    rounds = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(repeats):
            action()
        rounds.append((time.process_time() - started) / repeats * 1e6)
    return min(rounds)


def key_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that decides which kernel Triton compiles for these arguments.

    Dtype and alignment of a tensor; of a whole number, whether it is 1 or a multiple of 16.
    """
    return tuple(
        (one.dtype, one.data_ptr() % 16 == 0)
        if isinstance(one, Tensor)
        else (one == 1, one % 16 == 0)
        if isinstance(one, int)
        else type(one)
        for one in args
    )


def measured(repeats: int) -> dict[str, float]:
    """Microseconds of a launch of the norm, in its parts."""
    from absent_card import card

    from glassloop.engines.fused.norm import _add_norm

    x = torch.zeros(8, 4096, dtype=torch.bfloat16)
    args = (x, x, x[0], x, torch.empty_like(x), 4096, 4096, 4096, 4096, 1e-5)
    with card(90):
        made = _add_norm[(8,)](*args, ADD=True, BLOCK=4096, num_warps=8)
        run, handle, packed = made.run, made.function, made.packed_metadata
        return {
            "triton_us": microseconds(
                lambda: _add_norm[(8,)](*args, ADD=True, BLOCK=4096, num_warps=8), repeats
            ),
            "kernel_us": microseconds(
                lambda: run(8, 1, 1, 0, handle, packed, None, None, None, *args, True, 4096),
                repeats,
            ),
            "key_us": microseconds(lambda: key_of(args), repeats),
        }


def main(argv: list[str] | None = None) -> int:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5000)
    found = measured(parser.parse_args(argv).repeats)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
