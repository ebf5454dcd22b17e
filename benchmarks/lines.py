"""Lines of JSON that a benchmark writes as its measurements come, and the ranks that make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def line_writer(out: Path, *, fresh: bool = True, speaks: bool = True) -> Callable[..., None]:
    """A function that prints its arguments as a line and adds it to `out`.

    `fresh`: begin the file anew. `speaks`: False for ranks that leave the file to the first one.
    """
    if fresh and speaks:
        out.write_text("")

    def say(**line: Any) -> None:
        if speaks:
            tell(line, out)

    return say


def tell(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as a line; add it to `out`, if given."""
    line = json.dumps(result)
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def begin_ranks() -> tuple[int, int, torch.device]:
    """Join the ranks that torchrun started; returns rank, ranks and device.

    On a CPU a script can be tried out.
    """
    on_cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not on_cuda:
        return rank, ranks, torch.device("cpu")
    torch.cuda.set_device(rank)
    return rank, ranks, torch.device("cuda", rank)
