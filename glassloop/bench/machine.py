"""A card's own numbers while it works: clocks, power, throttling, link, energy.

They come through nvidia-smi and NVML. No torch.

Everything here is None, or empty, on a machine without them: a benchmark does not fail for want of
a wattmeter.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIELDS = {  # nvidia-smi's name -> ours
    "name": "card",
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "temperature_c",
    "pcie.link.gen.current": "pcie_generation",
    "pcie.link.gen.max": "pcie_generation_max",
    "pcie.link.width.current": "pcie_width",
}
# Newer drivers, older ones.
REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
REASONS = {  # bits of that field (NVML's nvmlClocksEventReasons)
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
NEWS_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
EVERY_MS = 250


def card_state(uuid: str | None) -> dict[str, Any] | None:
    """The card as it is now, under our names; None without nvidia-smi.

    `uuid` as nvidia-smi writes it; None: the machine's first card.
    """
    answer = _ask(uuid, tuple(FIELDS))
    if answer is None:
        return None
    state: dict[str, Any] = dict(zip(FIELDS.values(), map(_value, answer.split(",")), strict=True))
    # 570.10 is no number.
    state["driver"] = answer.split(",")[list(FIELDS).index("driver_version")].strip()
    reasons = next((found for field in REASONS_FIELDS if (found := _ask(uuid, (field,)))), None)
    return state | {"throttle": None if reasons is None else reasons_of(reasons)}


def _value(text: str) -> Any:
    """A number where it is one, None for what is not supported."""
    text = text.strip()
    if text.startswith("[") or text in ("N/A", ""):
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text else number


def reasons_of(text: str) -> list[str]:
    """Names of the bits of "0x0000000000000004"; an unknown bit stays a number."""
    try:
        bits = int(text.strip(), 16)
    except ValueError:
        return []
    known = [name for bit, name in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return [*known, *([hex(rest)] if rest else [])]


def _ask(uuid: str | None, fields: Sequence[str]) -> str | None:
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
        "-i",
        uuid or "0",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None


class Sampler:
    """Reader of one card's clocks and power during work.

    After the work a card is already idle.
    """

    def __init__(self, uuid: str | None):
        reasons = next(
            (field for field in REASONS_FIELDS if _ask(uuid, (field,)) is not None), None
        )
        fields = [*NEWS_FIELDS, *([reasons] if reasons else [])]
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
            "-i",
            uuid or "0",
        ]
        self._process: subprocess.Popen[str] | None = None
        if _ask(uuid, NEWS_FIELDS) is not None:
            self._process = subprocess.Popen(
                [*command, "-lms", str(EVERY_MS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )

    def stop(self) -> list[str]:
        """Lines for `summed_up`; none without nvidia-smi."""
        if self._process is None:
            return []
        self._process.terminate()
        output, _ = self._process.communicate(timeout=10)
        return output.splitlines()


def summed_up(lines: Sequence[str]) -> dict[str, Any] | None:
    """Medians, mean power and throttle reasons of a sampler's lines.

    Lines that were cut off are left out.
    """
    rows = [line.split(",") for line in lines]
    rows = [row for row in rows if len(row) == max(map(len, rows))]
    if not rows or len(rows[0]) < len(NEWS_FIELDS):
        return None
    columns = [
        [value for value in map(_value, column) if value is not None]
        for column in zip(*rows, strict=True)
    ]
    numbers = [[value for value in column if isinstance(value, int | float)] for column in columns]
    middle = [statistics.median(column) if column else None for column in numbers]
    seen = (
        {reason for value in columns[len(NEWS_FIELDS)] for reason in reasons_of(str(value))}
        if len(columns) > len(NEWS_FIELDS)
        else None
    )
    return {
        "samples": len(rows),
        "sm_mhz": middle[0],
        "sm_mhz_lowest": min(numbers[0], default=None),
        "memory_mhz": middle[1],
        "power_w": statistics.fmean(numbers[2]) if numbers[2] else None,
        "temperature_c": middle[3],
        "throttle": None if seen is None else sorted(seen),
    }


def energy_j(uuid: str | None) -> float | None:
    """Joules that the card has used since its driver was loaded.

    NVML's own counter, on Volta and newer.
    """
    if uuid is None:
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        return (
            used.value / 1000
            if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)) == 0
            else None
        )
    finally:
        nvml.nvmlShutdown()


def processor() -> str | None:
    """The processor's name, which decides how fast kernels are launched."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None
    )
