"""Test of a base that streams.

It says whether pages are locked, and how fast a card reads them.

`try_link` starts its process as `python -m glassloop.doctor.host_link FOLDER`, because a machine
that refuses may leave a CUDA context that is of no more use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from glassloop.doctor.children import environment_of_child

MIB = 256  # size of the file that is tried
COPIES = 10
LIMIT_S = 60.0


@dataclass(frozen=True)
class Link:
    """What one card and its host can do.

    Attributes:
        pages: "file": a file's own pages are locked read only. "copy": pages of shared memory are.
            "none": neither; `refused` says why.
        alone_gbs, both_ways_gbs: 1e9 bytes/s from the host to the card, alone and with copies back
            beside them; None if nothing was locked.
    """

    pages: str
    refused: str = ""
    alone_gbs: float | None = None
    both_ways_gbs: float | None = None


def try_link(folder: Path, *, limit_s: float = LIMIT_S) -> Link:
    """Lock a file's pages in `folder` and time copies to card 0.

    A process with a deadline does it.
    """
    command = [sys.executable, "-m", "glassloop.doctor.host_link", str(folder)]
    try:
        done = subprocess.run(
            command,
            env=environment_of_child(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Link("none", f"no answer within {limit_s:.0f} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Link("none", said)
    return Link(**json.loads(lines[-1]))


def measure(folder: Path) -> Link:
    """The same, in this process."""
    import torch

    from glassloop.base.host_pages import READ_ONLY, lock, shared_copy, shared_path

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".glassloop-link-") as file:
        size = MIB << 20
        for _ in range(MIB):
            file.write(os.urandom(1 << 20))
        file.flush()
        pages, kind = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8), "file"
        refused = lock(pages, [(0, size)], READ_ONLY)
        if refused is not None:
            try:
                pages, kind = shared_copy(pages, Path(file.name)), "copy"
                again = lock(pages, [(0, size)], 0)
            except (OSError, ValueError) as error:
                again = str(error)
            finally:
                shared_path(Path(file.name)).unlink(missing_ok=True)
            if again is not None:
                return Link("none", f"{refused}; {again}")
        return Link(kind, refused or "", gbs(pages, back=False), gbs(pages, back=True))


def gbs(pages: object, *, back: bool) -> float:
    """1e9 bytes/s of copies of locked pages to the card.

    With copies back beside them or not.
    """
    import torch

    assert isinstance(pages, torch.Tensor)
    there, other = torch.empty_like(pages, device="cuda"), torch.empty_like(pages, device="cuda")
    home = torch.empty_like(pages).pin_memory() if back else None
    up, down = torch.cuda.Stream(), torch.cuda.Stream()
    there.copy_(pages)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(COPIES):
        with torch.cuda.stream(up):
            there.copy_(pages, non_blocking=True)
        if home is not None:
            with torch.cuda.stream(down):
                home.copy_(other, non_blocking=True)
    up.synchronize()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return COPIES * pages.numel() / seconds / 1e9


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1])))))
