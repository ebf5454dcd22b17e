"""The engine `unsloth` on two ranks, with the stand-in in SITE.

Launched as `accelerate launch unsloth_ranks.py FOLDER MODEL ROWS SITE`.
"""

from __future__ import annotations

import os
import sys

from tiny import run_of

from glassloop.engines import unsloth_checks
from glassloop.formula.dist import leave
from train_loop import update_once

sys.path.insert(0, sys.argv[4])
unsloth_checks.problems = lambda **_: []  # the stand-in needs no GPU

if os.environ.get("SPOILED_RANK") == os.environ["RANK"]:
    import unsloth

    unsloth.FastLanguageModel.spoil = staticmethod(lambda hf: hf.lm_head.weight.data[3].add_(1))

records = {}
for engine in ("peft", "unsloth"):
    run = run_of(engine, execution={"engine": engine, "precision": "bf16"})
    assert run.replica.plain_engine.name == engine and run.replica.ranks == 2
    outcomes = [
        update_once(run, u) for u in (1, 2)
    ]  # update 2's gate has compared the replicas after update 1
    run.replica.adapters.check_views()
    records[engine] = [outcome.record for outcome in outcomes if outcome is not None]
    run.close_observers()
for theirs, ours in zip(records["peft"], records["unsloth"], strict=True):
    assert (
        abs(ours.loss_nats / theirs.loss_nats - 1) < 2e-3
        and abs(ours.grad_norm_pre_clip / theirs.grad_norm_pre_clip - 1) < 5e-2
    )
print(f"rank {run.replica.rank}: two updates alike", flush=True)
leave()
