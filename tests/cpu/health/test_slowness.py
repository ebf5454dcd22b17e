"""A slow update is named with its likely cause; ragged and noisy ones raise nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from plain_records import update_record

from glassloop.health.machine import Machine, machine_record
from glassloop.health.slowness import CAUSES, NEW_LEVEL, Slow, SlowUpdates
from glassloop.record.records import MachineRecord, UpdateRecord

USUAL = Machine(
    sm_clock_mhz=1700.0, power_w=600.0, temperature_c=62.0, throttle=4.0, card_busy=0.97,
    other_processes=0.0, device_allocations=0.0, page_faults=900.0, disk_faults=0.0,
    read_mib=0.0, cpu_s=2.0, preempted=3.0, processor_wait_s=0.01, host_gib=4.0,
    host_free_gib=200.0,
)  # fmt: skip


def timed(u: int, passes: tuple[float, ...] = (1.6, 1.6), **changes: Any) -> UpdateRecord:
    """An update of two ranks; it takes its slowest passes and 0.4 s more."""
    took = max(passes) + 0.4
    fields = {"update_s": took, "compute_s": took - 0.2, "rank_passes_s": passes} | changes
    return update_record(u, **fields)


def machine(u: int, *ranks: Machine) -> MachineRecord | None:
    return machine_record(u, 1, [one.numbers() for one in ranks])


def judged(
    passes: tuple[float, ...], *ranks: Machine, before: int = 12, **changes: Any
) -> Slow | None:
    """What is said of an update after `before` usual ones."""
    slow = SlowUpdates()
    for u in range(1, before + 1):
        assert slow.look(timed(u), machine(u, USUAL, USUAL)) is None
    u = before + 1
    return slow.look(timed(u, passes, **changes), machine(u, *(ranks or (USUAL, USUAL))))


HOT = replace(USUAL, throttle=0x24 * 1.0, temperature_c=88.0, sm_clock_mhz=900.0)
PLANTED = {
    "throttled": (HOT, "rank 1: its card was throttled (power cap + heat at 88 C, clock 900 MHz"),
    "shared card": (replace(USUAL, other_processes=1.0), "1 other processes compute on its card"),
    "allocator": (replace(USUAL, device_allocations=40.0), "CUDA was asked for memory 40 (usu"),
    "disk": (replace(USUAL, disk_faults=900.0), "900 (usually 0) page faults waited for a disk"),
    "host": (replace(USUAL, preempted=5000.0), "took its processor 5,000 (usually 3) times"),
    "rank": (USUAL, "waited for rank 1, and nothing on record says why"),
}


@pytest.mark.parametrize("cause", PLANTED)
def test_a_late_rank_is_named_with_what_was_unusual_there(cause: str) -> None:
    rank, words = PLANTED[cause]
    found = judged((1.6, 4.0), USUAL, rank)
    assert found is not None
    assert (found.cause, found.rank, found.took_s, found.expected_s) == (cause, 1, 4.4, 2.0)
    assert words in found.message and "took 4.4 s where 2 s were usual" in found.message
    assert cause in CAUSES


def test_reading_and_an_idle_card_are_causes_too() -> None:
    reads = judged((4.0, 1.6), replace(USUAL, read_mib=800.0), USUAL)
    idle = judged((4.0, 4.0), *[replace(USUAL, card_busy=0.3)] * 2)
    assert reads is not None and idle is not None
    assert (reads.cause, reads.rank) == ("disk", 0)
    assert (idle.cause, idle.rank) == ("host", None)  # both ranks: nobody waited for one
    assert "busy 30% of the time, usually 97%" in idle.message


def test_a_wait_for_a_processor_counts_once_it_explains_the_lost_time() -> None:
    """2.4 seconds were lost."""
    waited = judged((1.6, 4.0), USUAL, replace(USUAL, processor_wait_s=1.3))
    assert waited is not None and (waited.cause, waited.rank) == ("host", 1)
    assert "it waited 1.3 s for a processor: other work took them" in waited.message
    little = judged((1.6, 4.0), USUAL, replace(USUAL, processor_wait_s=1.1))
    assert little is not None and little.cause == "rank"


def test_what_is_unusual_on_a_rank_that_was_not_late_is_no_cause() -> None:
    found = judged((1.6, 4.0), HOT, USUAL)
    assert found is not None and found.cause == "rank"


def test_time_outside_of_the_passes_is_the_reduction_or_unknown() -> None:
    reduced = judged((1.6, 1.6), update_s=6.0, reduce_s=4.1)
    unknown = judged((1.6, 1.6), update_s=6.0)
    assert reduced is not None and reduced.cause == "reduction"
    assert unknown is not None and unknown.cause == "unknown"
    assert "4.1 s of it" in reduced.message


def test_without_readings_a_slow_update_is_slow_all_the_same() -> None:
    slow = SlowUpdates()
    for u in range(1, 12):
        assert slow.look(timed(u), None) is None
    found = slow.look(timed(12, (1.6, 4.0)), None)
    assert found is not None and (found.cause, found.rank) == ("rank", 1)


def test_the_first_updates_more_places_and_skipped_ones_raise_nothing() -> None:
    assert judged((9.0, 9.0), before=6) is None
    assert judged((3.6, 3.6), rank_slot_tokens=(2000, 2200)) is None
    assert judged((9.0, 9.0), supervised_tokens=0) is None
    assert judged((1.6, 4.0), rank_slot_tokens=(1000, 1100)) is not None


def test_a_new_level_is_told_a_few_times_and_then_is_usual() -> None:
    slow = SlowUpdates()
    told = [
        slow.look(timed(u, (4.0, 4.0) if u > 15 else (1.6, 1.6)), machine(u, USUAL, USUAL))
        for u in range(1, 60)
    ]
    assert [u for u, one in enumerate(told, 1) if one] == list(range(16, 16 + NEW_LEVEL))


def test_other_ranks_begin_anew() -> None:
    slow = SlowUpdates()
    for u in range(1, 12):
        slow.look(timed(u), None)
    alone = replace(
        timed(12, (8.0,)), rank_passes=(4,), rank_slot_tokens=(1000,), rank_passes_s=(8.0,)
    )
    assert slow.look(alone, None) is None


def test_ragged_and_noisy_updates_raise_nothing() -> None:
    """Places between 1 and 3 times as many, 10 % of noise, 5,000 updates."""
    drawn, slow = random.Random(3), SlowUpdates()
    for u in range(1, 5001):
        places = (drawn.randint(1000, 3000), drawn.randint(1000, 3000))
        passes = tuple(0.2 + one / 1000 * drawn.lognormvariate(0, 0.1) for one in places)
        record = timed(u, passes, rank_slot_tokens=places)
        assert slow.look(record, machine(u, USUAL, USUAL)) is None, u
