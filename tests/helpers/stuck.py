"""Two gloo ranks that are made to disagree.

Each has a watchdog that waits 2 seconds.

`accelerate launch stuck.py FOLDER CASE`; CASE is what rank 1 does in place of the sum of gradients.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from glassloop.formula.dist import (
    NUMBERS,
    RankReport,
    broadcast_from_rank_0,
    gather_reports,
    reduce_gradients,
)
from glassloop.loop.collectives import record_collectives
from glassloop.loop.watchdog import WAITS, Watchdog

VALUES: list[Any] = [kind(1) for kind in NUMBERS.values()]
REPORT = RankReport(*VALUES, row_loss_sums=(1.0,))
folder, case = Path(sys.argv[1]), sys.argv[2]
record_collectives()
rank = Accelerator(cpu=True).process_index
dog = Watchdog(folder, rank, 2, timeout_s=2.0, asked_to_stop=lambda: False)
dog.start()
while len(dog.positions()) < 2:  # a rank that starts late must not use up the other's 2 seconds
    time.sleep(0.05)
for update in (1, 2):
    dog.does(update, WAITS)
    gather_reports(REPORT, [1, 1])
    reduce_gradients(torch.ones(1024))
    broadcast_from_rank_0(torch.ones(()))
dog.does(3, WAITS if rank == 0 else "computes pass 1 of 2")
gather_reports(REPORT, [1, 1])
if rank == 0:
    reduce_gradients(torch.ones(1024))
elif case == "absent":
    time.sleep(60)
elif case == "another":
    dog.does(3, WAITS)
    dist.all_gather([torch.ones(4), torch.ones(4)], torch.ones(4))
time.sleep(60)
