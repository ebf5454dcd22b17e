"""Train on a disk of its own.

`python small_disk.py SIZE DISK KEPT WORDS ...` mounts a tmpfs.

Only this process sees the mount. What lies on the disk in the end is copied to KEPT.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

from train_loop import main

CLONE_NEWNS = 0x20000
MS_REC_PRIVATE = 0x44000


def mount(size: str, disk: str) -> None:
    """Mount a tmpfs of `size` at `disk` for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "a mount namespace of its own")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", disk], check=True)


if __name__ == "__main__":
    size, disk, kept, *words = sys.argv[1:]
    mount(size, disk)
    try:
        sys.exit(main(words))
    finally:
        shutil.copytree(disk, kept, dirs_exist_ok=True)
