"""A large card that looks smaller to torch."""

from __future__ import annotations

import torch

GIB = 2**30
_GENUINE = torch.cuda.mem_get_info  # of the whole card; this process may be limited several times


def limit_card(gib: float, device: torch.device) -> int:
    """Let torch take so many GiB of a card and find the rest taken; returns them in bytes.

    What torch's allocator does not see, such as the CUDA context, is outside of the limit. A CPU
    has nothing to limit.
    """
    most = int(gib * GIB)
    if device.type != "cuda":
        return most
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)

    def mem_get_info(asked: object = None) -> tuple[int, int]:
        where = device if asked is None else asked
        free, _ = _GENUINE(where)  # pyright: ignore[reportArgumentType]
        mine = most - torch.cuda.memory_reserved(where)  # pyright: ignore[reportArgumentType]
        return max(0, min(free, mine)), most

    torch.cuda.mem_get_info = mem_get_info
    return most
