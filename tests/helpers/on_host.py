"""Be a host of its own.

`python on_host.py NAME MODULE WORDS ...` runs a module in network NAME.
"""

from __future__ import annotations

import ctypes
import runpy
import socket
import sys

CLONE_NEWUTS = 0x4000000
CLONE_NEWNET = 0x40000000


def move(name: str) -> None:
    """Enter the network namespace `name`, and make it the host's name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"the namespaces of {name}")
    socket.sethostname(name)


if __name__ == "__main__":
    move(sys.argv[1])
    sys.argv[:] = sys.argv[2:]
    sys.modules.pop(sys.argv[0], None)  # or runpy warns that it is imported
    runpy.run_module(sys.argv[0], run_name="__main__")
