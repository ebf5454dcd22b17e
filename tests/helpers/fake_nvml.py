"""A stand-in for pynvml: a card whose values a test sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """Raised for a quantity that a card does not tell."""


class FakeNvml:
    """The functions and constants of pynvml that glassloop uses.

    Attributes:
        values: what the card says, by quantity; an exception is raised.
        asked: quantities in the order in which they were asked for.
    """

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1

    def __init__(self, **values: Any) -> None:
        self.values: dict[str, Any] = {
            "uuid": "GPU-a", "sm": 1980, "memory": 2619, "power": 412_500, "temperature": 61,
            "throttle": 0x4, "busy": 97, "rx": 1_500_000, "tx": 20_000, "processes": [1],
        } | values  # fmt: skip
        self.asked: list[str] = []

    def _told(self, name: str) -> Any:
        self.asked.append(name)
        value = self.values[name]
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self) -> None:
        self._told("uuid")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.values["uuid"]:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetClockInfo(self, _handle: str, kind: int) -> int:
        return self._told({1: "sm", 2: "memory"}[kind])

    def nvmlDeviceGetPowerUsage(self, _handle: str) -> int:
        return self._told("power")

    def nvmlDeviceGetTemperature(self, _handle: str, _sensor: int) -> int:
        return self._told("temperature")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle: str) -> int:
        return self._told("throttle")

    def nvmlDeviceGetUtilizationRates(self, _handle: str) -> Any:
        return SimpleNamespace(gpu=self._told("busy"), memory=50)

    def nvmlDeviceGetPcieThroughput(self, _handle: str, counter: int) -> int:
        return self._told({0: "tx", 1: "rx"}[counter])

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Any]:
        return self._told("processes")
