"""Readings of the machine: units, what is not told, one record for all ranks, little overhead."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml, NVMLError

import train_loop
from glassloop.health.machine import (
    FIELDS,
    Counters,
    Machine,
    Sampler,
    counters,
    cuda_allocations,
    machine_of,
    machine_record,
    pause_s,
)
from glassloop.health.nvml import CardReading, NvmlCard, open_card
from glassloop.record.records import MachineRecord
from glassloop.record.tracker_metrics import machine_metrics

BEGAN = Counters(100, 3, 2.0, 1.5, 7, 0.25, 40.0)


def test_a_card_is_read_in_the_units_of_the_fields() -> None:
    assert NvmlCard(FakeNvml(), "GPU-a").read() == CardReading(
        sm_clock_mhz=1980, memory_clock_mhz=2619, power_w=412.5, temperature_c=61, throttle=4,
        card_busy=0.97, pcie_in_mb_s=1500, pcie_out_mb_s=20, processes=1,
    )  # fmt: skip


def test_what_a_card_does_not_tell_is_none_and_asked_once() -> None:
    nvml = FakeNvml(rx=NVMLError("Not Supported"), processes=[])
    card = NvmlCard(nvml, "GPU-a")
    for _ in range(3):
        reading = card.read()
        assert (reading.pcie_in_mb_s, reading.pcie_out_mb_s) == (None, 20)
        assert reading.processes is None  # a container that sees none of them, ours neither
    assert (nvml.asked.count("rx"), nvml.asked.count("tx")) == (1, 3)


def test_without_package_library_or_card_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_card("a") == (None, "pip install nvidia-ml-py")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    card, why = open_card("a")
    assert (type(card), why) == (NvmlCard, None)
    assert open_card("b") == (None, "NVML says: Not Found")
    assert open_card(None) == (None, "this torch does not tell a card's UUID")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(uuid=NVMLError("Driver Not Loaded")))
    assert open_card("a") == (None, "NVML says: Driver Not Loaded")


def test_an_update_has_means_extremes_and_differences() -> None:
    readings = [
        (CardReading(sm_clock_mhz=1000, temperature_c=60, throttle=0x4, processes=3), 9.0),
        (CardReading(sm_clock_mhz=2000, temperature_c=80, throttle=0x20), 8.0),
    ]
    ended = Counters(160, 3, 66.0, 2.0, 9, 1.0, 41.0)
    found = machine_of(readings, BEGAN, ended, sharing=2)
    assert (found.sm_clock_mhz, found.temperature_c, found.throttle) == (1500, 80, 0x24)
    assert (found.other_processes, found.host_free_gib, found.power_w) == (1, 8.0, None)
    assert (found.page_faults, found.disk_faults, found.read_mib) == (60, 0, 64.0)
    assert (found.cpu_s, found.preempted, found.device_allocations) == (0.5, 2, 1.0)
    assert found.processor_wait_s == 0.75
    nothing = machine_of([], BEGAN, Counters(100, 3, None, 1.5, 7, None, None), sharing=1)
    assert (nothing.throttle, nothing.read_mib, nothing.device_allocations) == (None, None, None)


def test_the_record_has_each_rank_and_none_where_no_rank_knows() -> None:
    ranks = [Machine(power_w=400.0, throttle=0x24).numbers(), Machine(throttle=0.0).numbers()]
    record = machine_record(7, 2, ranks)
    assert record is not None
    assert (record.update, record.attempt, record.slow) == (7, 2, None)
    assert record.rank_power_w == (400.0, None)
    assert record.rank_throttle == ("power cap + heat", "")
    assert record.rank_sm_clock_mhz is None
    assert machine_record(7, 1, [(), ()]) is None
    names = {f"rank_{name}" for name in FIELDS}
    assert names == {name for name in MachineRecord.__annotations__ if name.startswith("rank_")}
    assert machine_metrics(record) == {"machine/rank0_power_w": 400.0}


def test_counters_are_the_process_s_own() -> None:
    began = counters()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])  # every page is touched
    assert counters().page_faults - began.page_faults > 1000
    assert cuda_allocations(torch.device("cpu"))() is None


def test_a_thread_reads_meanwhile_and_an_update_without_a_reading_has_the_newest() -> None:
    nvml = FakeNvml()
    sampler = Sampler(NvmlCard(nvml, "GPU-a"), 0.05)
    assert sampler.take() == ()
    sampler.start()
    deadline = time.monotonic() + 10
    while not nvml.asked.count("sm") and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.close()
    nvml.values["sm"] = 1000
    sampler.begin()
    assert dict(zip(FIELDS, sampler.take(), strict=True))["sm_clock_mhz"] == 1980
    sampler.read_once()
    assert dict(zip(FIELDS, sampler.take(), strict=True))["sm_clock_mhz"] == 1000


def test_a_reading_that_takes_long_comes_less_often() -> None:
    """At most 0.15 % of a processor goes into readings."""
    reads = []

    class Slow:
        def read(self) -> CardReading:
            reads.append(1)
            until = time.thread_time() + 0.005
            while time.thread_time() < until:
                pass
            return CardReading()

    sampler = Sampler(Slow(), 0.05)
    sampler.start()
    time.sleep(0.5)
    sampler.close()
    assert len(reads) == 1  # the second would come after 3.3 s, not after 0.05
    assert pause_s(0.5, 0.0001) == 0.5 and pause_s(0.5, 0.003) == pytest.approx(2.0)


def test_off_it_reads_nothing() -> None:
    sampler = Sampler(every_s=None)
    sampler.start()
    sampler.begin()
    assert sampler.take() == ()
    assert machine_record(1, 1, [sampler.take()]) is None


def test_the_main_thread_spends_little_on_it() -> None:
    """0.2 % of an update of 0.5 s is 1 ms."""
    sampler = Sampler(NvmlCard(FakeNvml(), "GPU-a"), 60.0)
    sampler.read_once()
    spent = []
    for _ in range(50):
        began = time.perf_counter()
        sampler.begin()
        sampler.take()
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[25] < 1e-3


@pytest.mark.parametrize("every_s", [0.05, None])
def test_a_run_records_its_machine_unless_told_not_to(run_of: Any, every_s: float | None) -> None:
    run = run_of(
        schedule={"updates": 3, "warmup_updates": 1},
        execution={"preflight": False},
        record={"machine_every_s": every_s},
    )
    assert train_loop.train(run) == 0
    run.close_observers()
    run.machine.close()
    lines = (run.folder / "machine.jsonl").read_text().splitlines()
    if every_s is None:
        assert lines == []
        return
    records = [json.loads(line) for line in lines]
    assert [record["update"] for record in records] == [1, 2, 3]
    for record in records:
        (cpu_s,), (gib,) = record["rank_cpu_s"], record["rank_host_gib"]
        assert math.isfinite(cpu_s) and cpu_s >= 0 and gib > 0.05
        assert record["rank_sm_clock_mhz"] is None  # no card here
