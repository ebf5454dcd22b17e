"""The sampler of this rank's machine."""

from __future__ import annotations

import torch

from glassloop.config import Config
from glassloop.health.machine import Sampler, cuda_allocations
from glassloop.health.nvml import open_card
from glassloop.loop.memory import ranks_on
from glassloop.loop.replica import Replica


def sampler_of(config: Config, replica: Replica) -> tuple[Sampler, tuple[str, ...]]:
    """Build the sampler. All ranks take part.

    Returns it, and a line for the header if the card cannot be read.
    """
    device, every_s = replica.device, config.record.machine_every_s
    if every_s is None or device.type != "cuda":
        return Sampler(every_s=every_s), ()
    card, why = open_card(_uuid_of(device))
    unread = () if why is None else (f"machine   clocks, power and heat are not recorded: {why}",)
    sharing = ranks_on(device)
    return Sampler(card, every_s, sharing=sharing, allocations=cuda_allocations(device)), unread


def _uuid_of(device: torch.device) -> str | None:
    found = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if found is None else str(found)
