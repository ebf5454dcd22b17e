"""A card's own numbers, as nvidia-smi writes them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from glassloop.bench import machine

SMI = """#!/bin/sh
case "$*" in
  *throttle*lms*|*event*lms*)
    for i in 1 2 3; do echo "1700, 9501, 300.50, 61, 0x0000000000000004"; done
    echo "1500, 9501, 340.50, 63, 0x0000000000000024"; echo "1700, 95"; exec sleep 5;;
  *event_reasons*) echo "Field is not a valid field to query" >&2; exit 2;;
  *throttle_reasons*) echo "0x0000000000000024";;
  *clocks.sm,clocks.mem*) echo "1700, 9501, 300.5, 61";;
  *driver_version*)
    echo "NVIDIA GeForce RTX 3090, 570.10, 350.00, [N/A], 1695, 2100, 9501, 60, 4, 4, 8";;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-smi of an older driver."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("smi")
def test_card_state_has_units_and_names_its_throttling() -> None:
    state = machine.card_state("GPU-1")
    assert state is not None
    assert state["card"] == "NVIDIA GeForce RTX 3090" and state["driver"] == "570.10"
    assert (state["power_limit_w"], state["power_w"], state["sm_mhz"], state["pcie_width"]) == (
        350.0,
        None,
        1695,
        8,
    )
    assert state["throttle"] == ["power cap", "thermal, software"]


@pytest.mark.usefixtures("smi")
def test_sampler_sums_up_what_was_seen_under_load() -> None:
    sampler = machine.Sampler("GPU-1")
    assert sampler._process is not None and sampler._process.stdout is not None
    time.sleep(0.5)
    seen = machine.summed_up(sampler.stop())
    assert seen is not None and seen["samples"] == 4  # the cut-off line is not one
    assert (seen["sm_mhz"], seen["sm_mhz_lowest"], seen["power_w"]) == (1700, 1500, 310.5)
    assert seen["throttle"] == ["power cap", "thermal, software"]


def test_a_machine_without_a_card_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.card_state(None) is None
    assert machine.summed_up(machine.Sampler(None).stop()) is None
    assert machine.energy_j(None) is None
    assert machine.reasons_of("0x0") == [] and machine.reasons_of("0x8000") == ["0x8000"]
