"""Clocks, power and heat of one card, from NVIDIA's management library.

The package nvidia-ml-py is an extra. What a card or driver does not tell is None from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

THROTTLES = {  # bit: name; other bits say that the card is idle or set to a clock
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class CardReading:
    """One reading of a card; None for what it does not tell."""

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle: float | None = None  # bits of THROTTLES
    card_busy: float | None = None  # share of the driver's last sampling period
    pcie_in_mb_s: float | None = None
    pcie_out_mb_s: float | None = None
    processes: float | None = None  # that compute on it, this one included


class Card(Protocol):
    """A card that can be read, on any thread."""

    def read(self) -> CardReading: ...


class NvmlCard:
    """A card behind NVML.

    Args:
        nvml: the module pynvml, initialised. handle: of the card.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._asks: dict[str, Callable[[], float]] = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "throttle": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "card_busy": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "pcie_in_mb_s": lambda: (
                nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_RX_BYTES) / 1e3
            ),
            "pcie_out_mb_s": lambda: (
                nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_TX_BYTES) / 1e3
            ),
            "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        assert set(self._asks) == {field.name for field in fields(CardReading)}

    def read(self) -> CardReading:
        """Ask for every quantity.

        It takes up to 0.1 s, in the driver and without the GIL.
        """
        found: dict[str, float] = {}
        for name, ask in list(self._asks.items()):
            try:
                found[name] = float(ask())
            except (self._nvml.NVMLError, AttributeError):  # not told here, or an older package
                del self._asks[name]
        if not found.get("processes"):  # 0 beside our own: the driver hides them, as in containers
            found.pop("processes", None)
        return CardReading(**found)


def open_card(uuid: str | None) -> tuple[NvmlCard | None, str | None]:
    """Open the card with this UUID.

    Returns the card, or None and the reason with its cure.

    Args:
        uuid: of torch.cuda.get_device_properties, without "GPU-"; None: this torch does not say.
    """
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, "pip install nvidia-ml-py"
    if uuid is None:
        return None, "this torch does not tell a card's UUID"
    try:
        pynvml.nvmlInit()
        return NvmlCard(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")), None
    except pynvml.NVMLError as error:
        return None, f"NVML says: {error}"


def throttle_names(bits: int) -> str:
    """The reasons that slow a card, joined; empty without one."""
    return " + ".join(name for bit, name in THROTTLES.items() if bits & bit)
