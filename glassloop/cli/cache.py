"""List what the cache holds; remove it by kind and age."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict

from glassloop.config.options import Options
from glassloop.disk.cache import named_root
from glassloop.disk.entries import KINDS, REMOVABLE, Entry, entries, remove
from glassloop.record.printable import printable

SCHEMA = 1  # of --json
UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
SIZES = ("KiB", "MiB", "GiB", "TiB")


def main(argv: list[str]) -> int:
    """`glassloop cache [--remove KIND,..] [--older 30d]`.

    Exit code 0; 1 if something that was to go stays; 2 for what is refused.
    """
    given = _parser().parse_args(argv)
    kinds = kinds_of(given.remove) if given.remove is not None else ()
    older_s = age_of(given.older) if given.older is not None else 0.0
    if not given.remove and (given.older is not None or given.dry_run):
        raise ValueError(
            f"--older and --dry-run go with --remove: name kinds, {', '.join(REMOVABLE)}, or all"
        )
    root, now = named_root(given.cache_dir), time.time()
    found = entries(root)
    due = [one for one in found if one.kind in kinds and now - one.used >= older_s]
    stays = {one: one.kept if given.dry_run else remove(root, one) for one in due}
    if given.json:
        removed = [one for one in due if not stays[one] and not given.dry_run]
        print(json.dumps(as_object(str(root), found, stays, removed, given.dry_run)))
    else:
        print("\n".join([f"{printable(str(root))}", *table(found, now)]))
        for one in due:
            print(outcome(one, stays[one], given.dry_run))
    return 1 if any(stays.values()) else 0


def _parser() -> argparse.ArgumentParser:
    own = Options(
        prog="glassloop cache",
        allow_abbrev=False,
        description="What glassloop made once and keeps: quantised bases, tokenised rows, compiled "
        "kernels. It makes them again if they are gone. What a process holds open stays.",
    )
    own.add_argument(
        "--remove",
        metavar="KIND,..",
        help=f"remove {', '.join(REMOVABLE)} (left by processes that died), or all of them",
    )
    own.add_argument(
        "--older", metavar="AGE", help="only what was not used for so long: 30d, 12h, 2w"
    )
    own.add_argument("--dry-run", action="store_true", help="say what --remove would do")
    own.add_argument("--cache-dir", metavar="DIR", help="the cache (model.cache_dir)")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    return own


def kinds_of(text: str) -> tuple[str, ...]:
    """Kinds of --remove. Raises ValueError for one that cannot be removed."""
    names = [name for name in text.split(",") if name]
    if names == ["all"]:
        return REMOVABLE
    if not names or (unknown := [name for name in names if name not in REMOVABLE]):
        odd = ", ".join(unknown) if names else repr(text)
        raise ValueError(f"--remove {odd}: there are {', '.join(REMOVABLE)}, or all")
    return tuple(names)


def age_of(text: str) -> float:
    """Seconds of an age such as 30d. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,6})([mhdw])", text)
    if found is None:
        raise ValueError(f"--older {text}: say a number and m, h, d or w, such as 30d")
    return int(found[1]) * UNITS_S[found[2]]


def table(found: list[Entry], now: float) -> list[str]:
    """A line for each entry, and the sum of each kind."""
    lines = [
        f"{one.kind:<11}{size(one.size_bytes):>10}  {age(now - one.used):>8}  {name(one)}"
        + (f"  ({one.kept})" if one.kept else "")
        for one in found
    ]
    if not lines:
        return ["it is empty"]
    sums = {kind: sum(one.size_bytes for one in found if one.kind == kind) for kind in KINDS}
    told = ", ".join(f"{kind} {size(total)}" for kind, total in sums.items() if total)
    return [f"{'kind':<11}{'size':>10}  {'unused':>8}  name", *lines, f"in all: {told}"]


def outcome(one: Entry, stays: str, dry: bool) -> str:
    done = "would be removed" if dry else "removed"
    return f"{name(one)}: stays, {stays}" if stays else f"{name(one)}: {done}"


def name(one: Entry) -> str:
    """An entry's place in the cache, safe for a terminal."""
    whole = f"{one.parent}/{one.name}" if one.parent else one.name
    return printable(whole, sys.stdout.encoding or "utf-8")


def size(count: int) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    value, unit = count / 1024, SIZES[0]
    for larger in SIZES[1:]:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def age(seconds: float) -> str:
    """A time since in whole units."""
    for unit, length in reversed(UNITS_S.items()):
        if unit != "w" and seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"


def as_object(
    root: str,
    found: list[Entry],
    stays: dict[Entry, str],
    removed: list[Entry],
    dry: bool,
) -> dict[str, object]:
    """Everything as plain JSON values; `kept` says why an entry stays."""
    lines = [
        asdict(one) | {"kept": stays.get(one) or one.kept, "removed": one in removed}
        for one in found
    ]
    return {"schema": SCHEMA, "folder": root, "dry_run": dry, "entries": lines}
