"""A run on a part of a large card: torch may take --gib of it, and finds no more free.

    accelerate launch --num_processes 2 benchmarks/limited.py --gib 11.2 r1_70b_scam WORDS...

Speeds are those of the large card. All further words go to train_loop.py.
"""

from __future__ import annotations

import os
import sys

import torch
from card_limit import limit_card


def split(argv: list[str]) -> tuple[float, list[str]]:
    """The GiB of --gib, and all other words. Raises SystemExit for what is no size."""
    try:
        at = argv.index("--gib")
        gib = float(argv[at + 1])
    except (ValueError, IndexError):
        raise SystemExit("limited.py needs --gib and a number of GiB, such as 11.2") from None
    if not gib > 0:
        raise SystemExit(f"--gib {gib:g}: it must be more than 0")
    return gib, argv[:at] + argv[at + 2 :]


def main() -> int:
    gib, words = split(sys.argv[1:])
    if torch.cuda.is_available():
        limit_card(gib, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    else:
        print("--gib: there is no card to limit, so nothing is limited", file=sys.stderr)
    import train_loop

    return train_loop.main(words)


if __name__ == "__main__":
    sys.exit(main())
