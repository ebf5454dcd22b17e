"""What the cards are and how they are linked.

Prints one JSON. In a process of its own, so that nobody else holds a context on a card.

python benchmarks/two_gpus_machine.py cuda|cpu 1|2
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch
from torch.cuda import nccl

from glassloop.bench.machine import card_state, processor
from glassloop.disk.environment import environment
from glassloop.doctor.p2p import try_all_reduce
from glassloop.predict.host import spare_bytes


def facts(device: str, wanted: int) -> dict[str, Any]:
    """Versions, commit, cards, the host; of two cards their links.

    The links are topology, whether the cards reach each other's memory, and an all-reduce between
    two processes.
    """
    return machine(device) | (links(device == "cuda") if wanted > 1 else {})


def machine(device: str) -> dict[str, Any]:
    cuda = device == "cuda"
    cards = torch.cuda.device_count() if cuda else 0
    uuids = [f"GPU-{torch.cuda.get_device_properties(card).uuid}" for card in range(min(cards, 2))]
    return {
        **environment([]),
        "device": device,
        "cards_seen": cards,
        "cards": [card_state(uuid) for uuid in uuids],
        "cpu": processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "load_1_min": os.getloadavg()[0],
        "host_spare_gib": round(spare_bytes() / 2**30, 1),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }


def links(cuda: bool) -> dict[str, Any]:
    reach = torch.cuda.can_device_access_peer(0, 1) if torch.cuda.device_count() > 1 else None
    answer = try_all_reduce("nccl" if cuda else "gloo")
    return {
        "topology": _said("nvidia-smi", "topo", "-m") if cuda else None,
        "p2p_read": _said("nvidia-smi", "topo", "-p2p", "r") if cuda else None,
        "p2p": reach,
        "nccl": ".".join(map(str, nccl.version())) if cuda else None,
        "nccl_environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")
        },
        "all_reduce_4_mib": vars(answer),
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
    print(json.dumps(facts(sys.argv[1], int(sys.argv[2]))))
