"""What the two cards are and how they are linked.

Prints one JSON. In a process of its own, so that nobody else holds a context on a card.

python benchmarks/two_gpus_machine.py cuda|cpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch.cuda import nccl

from glassloop.bench.machine import card_state, processor
from glassloop.disk.environment import environment
from glassloop.doctor.p2p import try_all_reduce


def facts(device: str) -> dict[str, Any]:
    """Versions, commit, cards, topology, whether they reach each other's memory, and an all-reduce
    between two processes.
    """
    cuda = device == "cuda"
    cards = torch.cuda.device_count() if cuda else 0
    uuids = [f"GPU-{torch.cuda.get_device_properties(card).uuid}" for card in range(min(cards, 2))]
    answer = try_all_reduce("nccl" if cuda else "gloo")
    return {
        **environment(["benchmarks/two_gpus.sh"]),
        "device": device,
        "cards_seen": cards,
        "cards": [card_state(uuid) for uuid in uuids],
        "topology": _said("nvidia-smi", "topo", "-m") if cuda else None,
        "p2p_read": _said("nvidia-smi", "topo", "-p2p", "r") if cuda else None,
        "p2p": torch.cuda.can_device_access_peer(0, 1) if cards > 1 else None,
        "nccl": ".".join(map(str, nccl.version())) if cuda else None,
        "nccl_environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")
        },
        "all_reduce_4_mib": vars(answer),
        "cpu": processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "load_1_min": os.getloadavg()[0],
    }


def _said(*words: str) -> str | None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
