"""Specs and lines of results, made up for tests of the benchmark."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glassloop.bench import results
from glassloop.bench.matrix import specs_of
from glassloop.bench.processes import Place
from glassloop.bench.spec import Spec


def specs(**changes: Any) -> list[Spec]:
    asked: dict[str, Any] = dict(
        engines=["peft"],
        workloads=["scam-v1", "full-v1"],
        layouts=["literal", "packed"],
        ranks=[1, 2],
        batches=[2],
        checkpointing=[True],
    )
    common = dict(rows_per_update=8, model="random:tiny", precision="fp32", updates=2, warmup=1)
    return specs_of(**{**asked, **changes}, place=Place("cpu", 0), common=common)


def line(
    speed: float = 1000.0,
    *,
    loss: float = 7.0,
    norm: float = 0.5,
    gpus: int = 2,
    repeat: int = 0,
    **cell: Any,
) -> dict[str, Any]:
    spec = Spec("peft", "scam-v1", "literal", 1, 2, 8, "random:tiny", "bf16", repeat=repeat)
    spec = replace(spec, **cell)
    return {
        "schema": 1,
        "kind": "bench",
        "name": spec.name,
        "repeat": repeat,
        "cell": spec.cell,
        "rows_digest": f"{spec.workload}{spec.rows_per_update}",
        "tokens_per_s": {"real": speed},
        "tokens_per_s_per_rank": {"real": speed / spec.ranks},
        "update_s": {"median": 1.0, "p10": 0.9, "p90": 1.1},
        "peak": {"allocated_gib": 7.5},
        "flops": {"mfu": 0.25},
        "update_1": {"loss_nats": loss, "grad_norm": norm},
        "card": {"before": None, "during": None, "after": None, "p2p": None},
        "machine": {
            "gpus": [{"name": "NVIDIA GeForce RTX 3090", "memory_gib": 23.7}] * gpus,
            "git": {"commit": "0123456789abcdef", "changed": False},
            "packages": {"torch": "2.11.0"},
            "driver": "570.10",
            "cuda": "13.0",
            "glassloop": "0.1.0",
        },
    }


def judged(*lines: dict[str, Any]) -> list[dict[str, Any]]:
    return [one | {"check": results.checked(one, lines)} for one in lines]
