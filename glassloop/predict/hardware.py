"""Facts of GPUs by name: peak rate, memory, bandwidth, bf16.

Unknown facts are None, and no card stands in for another. Rates and bandwidths are the makers' data
sheets (dense, not "with sparsity"); `usable_gib` is what torch reports as a card's total memory,
the lowest that is commonly seen.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Facts of one model of card.

    Attributes:
        key: short name, as commands take it.
        names: what torch or nvidia-smi call it, without "NVIDIA".
        usable_gib: memory that a process can use, its CUDA context included.
        bf16_tflops: peak dense bf16 matrix products with fp32 sums, 1e12 FLOP/s; None without
            bf16 units.
        bandwidth_tbs: memory bandwidth, 1e12 bytes/s.
        capability: CUDA compute capability.
    """

    key: str
    names: tuple[str, ...]
    usable_gib: float
    bf16_tflops: float | None
    bandwidth_tbs: float
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        return self.capability >= (8, 0)


GPUS = (
    Gpu("T4", ("Tesla T4", "T4"), 14.56, None, 0.320, (7, 5)),
    Gpu("V100-32", ("Tesla V100-SXM2-32GB", "Tesla V100-PCIE-32GB"), 31.73, None, 0.900, (7, 0)),
    Gpu("A10G", ("A10G",), 21.98, 70.0, 0.600, (8, 6)),
    Gpu("L4", ("L4",), 21.95, 121.0, 0.300, (8, 9)),
    Gpu("3060", ("GeForce RTX 3060",), 11.76, 25.6, 0.360, (8, 6)),
    Gpu("3090", ("GeForce RTX 3090",), 23.68, 71.0, 0.936, (8, 6)),
    Gpu("3090Ti", ("GeForce RTX 3090 Ti",), 23.68, 80.0, 1.008, (8, 6)),
    Gpu("4070", ("GeForce RTX 4070",), 11.71, 58.3, 0.504, (8, 9)),
    Gpu("4080", ("GeForce RTX 4080",), 15.70, 97.5, 0.717, (8, 9)),
    Gpu("4090", ("GeForce RTX 4090",), 23.52, 165.2, 1.008, (8, 9)),
    Gpu("5060Ti", ("GeForce RTX 5060 Ti",), 15.48, 47.4, 0.448, (12, 0)),
    Gpu("5070Ti", ("GeForce RTX 5070 Ti",), 15.48, 87.9, 0.896, (12, 0)),
    Gpu("5080", ("GeForce RTX 5080",), 15.48, 112.6, 0.960, (12, 0)),
    Gpu("5090", ("GeForce RTX 5090",), 31.36, 209.5, 1.792, (12, 0)),
    Gpu("A6000", ("RTX A6000",), 47.4, 154.8, 0.768, (8, 6)),
    Gpu("L40S", ("L40S",), 44.4, 362.0, 0.864, (8, 9)),
    Gpu("A100-40", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 39.39, 312.0, 1.555, (8, 0)),
    Gpu("A100-80", ("A100-SXM4-80GB", "A100 80GB PCIe"), 79.15, 312.0, 1.935, (8, 0)),
    Gpu("H100-PCIe", ("H100 PCIe",), 79.1, 756.0, 2.039, (9, 0)),
    Gpu("H100", ("H100 80GB HBM3",), 79.1, 989.4, 3.352, (9, 0)),
    Gpu("H200", ("H200",), 139.7, 989.4, 4.800, (9, 0)),
)
PLANNED_FOR = (
    "3090",
    "4070",
    "5060Ti",
    "4080",
    "4090",
    "5090",
    "L40S",
    "A6000",
    "A100-40",
    "A100-80",
    "H100",
    "H200",
)  # cards that a plan shows without being asked


def gpu_named(name: str) -> Gpu | None:
    """Facts of the card called `name`; None if unknown.

    The name is torch's, nvidia-smi's or a short key. The whole name must agree: a "GeForce RTX 4090
    Laptop GPU" is not a 4090, and an "NVIDIA H100" without more is not known to be one of its
    kinds.
    """
    wanted = name.strip().lower()
    bare = wanted.removeprefix("nvidia ").strip()
    for gpu in GPUS:
        if wanted == gpu.key.lower() or bare in [known.lower() for known in gpu.names]:
            return gpu
    return None


@dataclass(frozen=True)
class Present:
    """A card of this machine as nvidia-smi tells of it."""

    name: str
    total_gib: float
    free_gib: float
    driver: str
    capability: tuple[int, int] | None  # None if nvidia-smi does not say

    @property
    def gpu(self) -> Gpu | None:
        return gpu_named(self.name)


def gpus_present() -> tuple[Present, ...]:
    """The machine's cards, by nvidia-smi; empty without an answer in 5 s.

    It needs no torch and no CUDA context. nvidia-smi ignores CUDA_VISIBLE_DEVICES.
    """
    fields = "name,memory.total,memory.free,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=5, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_smi(answer)


def parse_smi(answer: str) -> tuple[Present, ...]:
    """Cards from nvidia-smi's csv lines.

    A line is name, MiB in all, MiB free, driver, capability; lines of another form are skipped.
    """
    found = []
    for line in answer.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and parts[1].isdigit() and parts[2].isdigit():
            major, dot, minor = parts[4].partition(".")
            capability = (
                (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None
            )
            found.append(
                Present(parts[0], int(parts[1]) / 1024, int(parts[2]) / 1024, parts[3], capability)
            )
    return tuple(found)


def card_here(present: tuple[Present, ...] | None = None) -> str:
    """Name of this machine's kind of card, as --hardware takes it.

    `cpu` without one. Raises ValueError for cards that are not in the table, or for several kinds.
    """
    names = {card.name for card in (gpus_present() if present is None else present)}
    if not names:
        return "cpu"
    keys = {gpu.key.lower() if (gpu := gpu_named(name)) else None for name in names}
    if len(keys) > 1 or None in keys:
        raise ValueError(
            f"--hardware: this machine has {', '.join(sorted(names))}; name the card whose "
            "settings all ranks take, for example --hardware 3090"
        )
    return str(keys.pop())
