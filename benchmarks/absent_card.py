"""A Triton driver for a card that is not there.

Kernels compile, and launching does nothing. So a test sees on any machine which kernels a pass
asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StubDriver:
    """What Triton's launcher asks a driver for."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.launched: list[Any] = []  # arguments of each launch
        driver = self

        class Launcher:
            def __init__(self, _source: Any, _metadata: Any):
                pass

            def __call__(self, *args: Any) -> None:
                driver.launched.append(args)

        class Utils:
            @staticmethod
            def get_device_properties(_device: int) -> dict[str, int]:
                return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

            @staticmethod
            def load_binary(*_args: Any) -> tuple[int, int, int, int, int]:
                return 1, 2, 0, 0, 1024

        self.launcher_cls, self.utils = Launcher, Utils

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")


@contextmanager
def card(arch: int) -> Iterator[StubDriver]:
    """A card of compute capability arch / 10, for the block."""
    from triton.runtime.driver import driver

    stub, before = StubDriver(arch), driver._active
    forget()
    driver._active = stub  # type: ignore[assignment]
    try:
        yield stub
    finally:
        driver._active = before
        forget()


def kernels() -> list[Any]:
    """Every kernel of the fused engine's modules that are imported."""
    from triton.runtime.jit import JITFunction

    modules = [one for name, one in list(sys.modules.items()) if name.startswith("glassloop.")]
    found = [one for module in modules for one in vars(module).values()]
    return list({id(one): one for one in found if isinstance(one, JITFunction)}.values())


def forget() -> None:
    """Forget what was compiled in this process, and for which card."""
    for one in kernels():
        one.device_caches.clear()


def compiled() -> dict[tuple[str, str], Any]:
    """(kernel, its key) -> what was compiled."""
    return {
        (one.fn.__qualname__, key): made
        for one in kernels()
        if one.device_caches
        for key, made in one.device_caches[0][0].items()
    }
