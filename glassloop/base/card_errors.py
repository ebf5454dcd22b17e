"""Errors of a card or a machine.

They are told from faults of a file, a config or a kernel. Not every library has a class for them,
so their words count too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CLASSES = ("OutOfMemoryError", "AcceleratorError", "DistBackendError", "MemoryError")
# Of a card: torch's allocator, what else asks the driver, cuBLAS, Triton.
LACKING = (
    r"CUDA out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CUBLAS_STATUS_ALLOC_FAILED|Triton Error \[CUDA\]: out of memory"
)
# After these, nothing that the process asks of the card is answered any more.
LOST = (
    r"illegal memory access|misaligned address|device-side assert|unspecified launch failure"
    r"|uncorrectable ECC error|illegal instruction|hardware stack error|launch timed out"
)
ANY = (
    rf"{LACKING}|{LOST}|CUDA error|CUDA driver|NVIDIA driver|CUBLAS_STATUS_|CUDNN_STATUS_"
    r"|Triton Error \[CUDA\]|NCCL error|DefaultCPUAllocator|Cannot allocate memory"
)


def lacks_memory(error: BaseException) -> bool:
    """Whether a card has no memory left.

    The process may compute with less.
    """
    named = type(error).__name__ == "OutOfMemoryError"
    return named or re.search(LACKING, str(error)) is not None


def lost_card(error: BaseException) -> bool:
    """Whether the card answers this process no more."""
    return re.search(LOST, str(error)) is not None


def of_the_machine(error: BaseException) -> str:
    """The line that puts a card or the host's memory at fault.

    Empty if there is none.
    """
    if type(error).__name__ in CLASSES:
        return first_line(error, type(error).__name__)
    for text in (str(error), *_set_aside(error)):
        found = [line for line in text.splitlines() if re.search(ANY, line)]
        if found:
            return found[-1].strip()[:300]
    return ""


def _set_aside(error: BaseException) -> Iterator[str]:
    """What transformers met while it converted weights.

    It raises an error after the last weight, without a cause.
    """
    place = error.__traceback__
    while place is not None:
        told = getattr(place.tb_frame.f_locals.get("loading_info"), "conversion_errors", None)
        if isinstance(told, dict):
            yield from map(str, told.values())
        place = place.tb_next


def first_line(error: BaseException, otherwise: str = "no reason given") -> str:
    """What an error says first; `otherwise` if it says nothing."""
    return (str(error).strip() or otherwise).splitlines()[0][:300]
