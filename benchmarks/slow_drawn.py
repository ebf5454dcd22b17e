"""Updates and readings of a drawn machine, for the detector of slow updates."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from glassloop.health.machine import Machine, machine_record
from glassloop.health.slowness import Slow, SlowUpdates
from glassloop.record.records import MachineRecord, UpdateRecord

Pair = tuple[UpdateRecord, MachineRecord | None]
BASE_S, PASSES_S, REDUCE_S = 0.1, 0.9, 0.02  # of an update of usual length
PLACES = 4000  # slot tokens of a rank's usual update
WARM = 30  # sound updates before a planted one
PLANTED = (
    "throttled", "shared card", "allocator", "disk", "idle card", "taken cores", "rank",
    "reduction",
)  # fmt: skip
NAMED = {"idle card": "host", "taken cores": "host"}  # the others have their own name


@dataclass(frozen=True)
class Drawn:
    """How a machine and its rows scatter.

    Attributes:
        sigma: standard deviation of the logarithm of a pass's time.
        ragged: an update's places lie between 1 and `ragged` times the least.
        power_capped: the card's clock follows its load, within 5 %, as under a power cap.
    """

    ranks: int
    sigma: float
    ragged: float = 1.0
    power_capped: bool = True


def update_of(
    drawn: random.Random, how: Drawn, number: int, *, cause: str | None = None, factor: float = 1.0
) -> Pair:
    """Draw an update and its readings.

    Under a cause the last rank, or the sum of gradients, makes it `factor` times as long.
    """
    places = [int(PLACES * drawn.uniform(1.0, how.ragged)) for _ in range(how.ranks)]
    passes = [PASSES_S * one / PLACES * drawn.lognormvariate(0, how.sigma) for one in places]
    machines = [_machine(drawn, how, one) for one in passes]
    rest, reduce_s = BASE_S * drawn.lognormvariate(0, how.sigma), REDUCE_S
    if cause == "reduction":
        reduce_s += (factor - 1) * (max(passes) + rest + reduce_s)
    elif cause is not None:
        late = (factor - 1) * (max(passes) + rest + reduce_s) + max(passes)
        machines[-1] = _planted(machines[-1], cause, factor, late - max(passes))
        passes[-1] = late
    took = max(passes) + rest + reduce_s
    record = UpdateRecord(
        update=number, updates=1000, epoch=0, rows=16, lr=1e-4, loss_nats=2.0,
        grad_norm_pre_clip=1.0, clip_coef=1.0, action="applied", reason=None,
        supervised_tokens=2000, rank_loss_nats=(2.0,) * how.ranks,
        rank_supervised_tokens=(1000,) * how.ranks, rank_real_tokens=tuple(places),
        rank_slot_tokens=tuple(places), rank_passes=(4,) * how.ranks, rank_grad_norm=None,
        rank_cosine=None, loss_scale=None, update_s=took, compute_s=took - reduce_s,
        reduce_s=reduce_s, rank_peak_gib=None, rank_passes_s=tuple(passes),
    )  # fmt: skip
    return record, machine_record(number, 1, [one.numbers() for one in machines])


def _machine(drawn: random.Random, how: Drawn, passes_s: float) -> Machine:
    """Readings of a sound update, with their own scatter."""
    return Machine(
        sm_clock_mhz=1980.0 * (drawn.uniform(0.90, 1.0) if how.power_capped else 1.0),
        power_w=drawn.uniform(520, 700), temperature_c=float(drawn.randint(58, 66)),
        throttle=float(drawn.choice((0x0, 0x4)) if how.power_capped else 0),
        card_busy=min(1.0, drawn.gauss(0.95, 0.02)), other_processes=0.0,
        device_allocations=float(drawn.choice((0, 0, 0, 1))),
        page_faults=drawn.lognormvariate(7, 0.5), disk_faults=float(drawn.choice((0, 0, 0, 3))),
        read_mib=drawn.choice((0.0, 0.0, 0.1)), cpu_s=passes_s * drawn.uniform(1.0, 1.2),
        preempted=float(int(drawn.lognormvariate(2, 0.7))),
        processor_wait_s=drawn.lognormvariate(-5, 1.0), host_gib=4.0, host_free_gib=200.0,
    )  # fmt: skip


def _planted(machine: Machine, cause: str, factor: float, lost_s: float) -> Machine:
    """What the readings of the late rank look like under a cause."""
    assert machine.sm_clock_mhz is not None and machine.card_busy is not None
    changes: dict[str, dict[str, float]] = {
        "throttled": {
            "sm_clock_mhz": machine.sm_clock_mhz / factor,
            "throttle": float(0x20),
            "temperature_c": 89.0,
        },
        "shared card": {"other_processes": 1.0},
        "allocator": {"device_allocations": 30.0},
        "disk": {"read_mib": 400.0, "disk_faults": 80.0},
        "idle card": {"card_busy": machine.card_busy / factor},
        "taken cores": {"processor_wait_s": 0.7 * lost_s},
        "rank": {},
    }
    return replace(machine, **changes[cause])


def clean(how: Drawn, runs: int, updates: int) -> dict[str, Any]:
    """False alarms on sound runs."""
    alarms, told = 0, 0
    for seed in range(runs):
        drawn, slow = random.Random(f"{seed} {how}"), SlowUpdates()
        found = [slow.look(*update_of(drawn, how, u)) for u in range(1, updates + 1)]
        alarms += sum(one is not None for one in found)
        told += any(found)
    return {
        **vars(how),
        "updates": runs * updates,
        "false_alarms": alarms,
        "a_thousand_updates": round(1000 * alarms / (runs * updates), 3),
        "runs": runs,
        "runs_with_one": told,
    }


def hits(how: Drawn, cause: str, factor: float, runs: int) -> dict[str, Any]:
    """Plant a cause; count how often it is seen, named and placed."""
    found: list[Slow | None] = []
    for seed in range(runs):
        drawn, slow = random.Random(f"{seed} {how} {cause}"), SlowUpdates()
        for u in range(1, WARM + 1):
            slow.look(*update_of(drawn, how, u))
        found.append(slow.look(*update_of(drawn, how, WARM + 1, cause=cause, factor=factor)))
    seen = [one for one in found if one is not None]
    where = how.ranks - 1 if how.ranks > 1 and cause != "reduction" else None
    return {
        "cause": cause, "ranks": how.ranks, "sigma": how.sigma, "ragged": how.ragged,
        "times_as_long": factor, "planted": runs, "seen": len(seen),
        "named": sum(one.cause == NAMED.get(cause, cause) for one in seen),
        "rank_right": sum(one.rank == where for one in seen),
    }  # fmt: skip
