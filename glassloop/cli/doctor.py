"""Check this machine before a run, or explain an error message."""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from glassloop.config.options import Options

if TYPE_CHECKING:
    from glassloop.config import Config
    from glassloop.doctor.findings import Finding

SIGNS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
WIDTH, INDENT = 100, 20


def main(argv: list[str]) -> int:
    """`glassloop doctor [PRESET] [OPTION] ...`, or `glassloop doctor "MESSAGE"`.

    Exit code 1: a problem was found, or the message is unknown.
    """
    own = Options(prog="glassloop doctor", add_help=False, allow_abbrev=False, description=__doc__)
    own.add_argument(
        "--explain",
        metavar="TEXT",
        help='cause and cure of an error message; `glassloop doctor "MESSAGE"` is short for it',
    )
    own.add_argument(
        "--config_file",
        type=Path,
        metavar="FILE",
        help="launch file to check instead of Accelerate's default one",
    )
    own.add_argument(
        "--with-data", action="store_true", help="read the data set and check its columns"
    )
    own.add_argument("--json", action="store_true", help="print the findings as JSON")
    if {"-h", "--help"} & set(argv):
        own.print_help()
        print("\nAll other words are those of train_loop.py:\n")
    given, words = own.parse_known_args(argv)
    message = given.explain if given.explain is not None else message_in(words)
    if message is not None:
        return explain(message, as_json=given.json)
    from glassloop.config.arguments import parse
    from glassloop.doctor.findings import PROBLEM

    config = parse(words, prog="glassloop doctor")
    findings = examine(config, given.config_file, with_data=given.with_data)
    problems = sum(one.level == PROBLEM for one in findings)
    if given.json:
        print(
            json.dumps(
                {"schema": 1, "problems": problems, "findings": [vars(one) for one in findings]},
                indent=1,
            )
        )
    else:
        for one in findings:
            print("\n".join(shown(one)))
        print(
            f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problem found"
        )
    return 1 if problems else 0


def message_in(words: list[str]) -> str | None:
    """Join the words of an error message; None for a config's words."""
    if any(word.startswith("--") or re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) for word in words):
        return None
    text = " ".join(words).strip()
    return text if re.search(r"\s", text) else None


def examine(config: Config, launch_file: Path | None, *, with_data: bool) -> list[Finding]:
    """All checks, in the order in which they are printed."""
    from glassloop.doctor import card_checks, launch_files
    from glassloop.doctor import checks as doctor
    from glassloop.predict.hardware import gpus_present

    environ, present, cuda = os.environ, gpus_present(), doctor.torch_cuda()
    return [
        *doctor.check_versions(),
        *doctor.check_compiled(environ),
        *doctor.check_pins(),
        *doctor.check_engine(config, on_cuda=cuda is not None and bool(present)),
        *card_checks.check_cards(config, present, cuda, environ),
        *check_p2p(len(present) if cuda is not None else 0),
        *check_stream(config, len(present) if cuda is not None else 0),
        *launch_files.check_launcher(config, environ, launch_file),
        *doctor.check_disk(config, environ),
        *doctor.check_logins(config, environ),
        *check_data(config, with_data),
    ]


def check_p2p(gpus: int) -> list[Finding]:
    """Time a small all-reduce between two cards; name what cures a hang."""
    from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
    from glassloop.doctor.p2p import LIMIT_S, MIB, find_cure, try_all_reduce

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        gpus
        if hidden is None
        else min(gpus, len([part for part in hidden.split(",") if part.strip() not in ("", "-1")]))
    )
    if visible < 2:
        return [Finding(NOTE, "p2p", f"not tried: it needs two GPUs, {visible} visible")]
    answer = try_all_reduce()
    if answer.outcome == "ok":
        return [
            Finding(
                OK,
                "p2p",
                f"an all-reduce of {MIB} MiB between two GPUs took {1e3 * answer.seconds:.1f} ms",
            )
        ]
    said = f"hung for {LIMIT_S:.0f} s" if answer.outcome == "hang" else f"failed: {answer.text}"
    cure = find_cure()
    if cure is None:
        text = (
            "NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 do not help: look at the driver (nvidia-smi "
            "topo -m) and at NCCL_DEBUG=INFO"
        )
    else:
        words = " ".join(f"{name}={value}" for name, value in cure.items())
        text = f"export {words} (tried: it works with that)"
    return [Finding(PROBLEM, "p2p", f"an all-reduce of {MIB} MiB between two GPUs {said}", text)]


def check_stream(config: Config, gpus: int) -> list[Finding]:
    """Try whether a base can stream from this host, and time it."""
    from glassloop.disk.cache import cache_root
    from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
    from glassloop.doctor.host_link import try_link

    if not gpus:
        return [Finding(NOTE, "stream", "not tried: it needs a GPU")]
    root = cache_root(config.model.cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [Finding(PROBLEM, "stream", f"not tried: {error}", "model.cache_dir=FOLDER")]
    link = try_link(root)
    if link.pages == "none":
        asked = config.memory.base not in ("auto", "gpu")
        cure = "memory.base=gpu, or raise `ulimit -l` and the container's memory limit"
        text = f"a base cannot stream from this host: {link.refused}"
        return [Finding(PROBLEM if asked else NOTE, "stream", text, cure)]
    how = (
        "a file's pages are locked read only"
        if link.pages == "file"
        else f"a copy in shared memory is locked, since a file's pages are not ({link.refused})"
    )
    text = (
        f"a base can stream from this host: {how}; {link.alone_gbs:.1f} GB/s to the card, "
        f"{link.both_ways_gbs:.1f} with copies back beside them"
    )
    return [Finding(OK, "stream", text)]


def check_data(config: Config, with_data: bool) -> list[Finding]:
    """Read the data set and check its columns, if asked to."""
    from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding

    if not with_data:
        return [
            Finding(
                NOTE,
                "data",
                f"{config.data.source} was not read",
                "--with-data reads it and checks its columns",
            )
        ]
    from glassloop.data.sources import load_examples

    try:
        loaded = load_examples(config.data, config.seed)
    except ValueError as error:
        return [
            Finding(
                PROBLEM,
                "data",
                str(error),
                "data.format and data.columns.* say which column is what",
            )
        ]
    held = f", {len(loaded.heldout):,} held out" if loaded.heldout else ""
    return [
        Finding(
            OK,
            "data",
            f"{loaded.source}: format {loaded.format}, {len(loaded.train):,} of {loaded.total:,} "
            f"rows taken{held}",
        )
    ]


def explain(message: str, *, as_json: bool) -> int:
    """Explain an error message. Exit code 1 if it is unknown."""
    from glassloop.doctor.known_errors import explain as look_up

    found = look_up(message)
    if as_json:
        told = [{"cause": one.cause, "cure": one.cure} for one in found]
        print(json.dumps({"schema": 1, "found": told}, indent=1))
    elif not found:
        print(
            "nothing is known of this message. GLASSLOOP_TRACEBACK=1 shows where a refusal comes "
            "from; `glassloop doctor` checks the machine"
        )
    else:
        for one in found:
            print("\n".join([*_wrap("cause", one.cause), *_wrap("cure", one.cure)]))
    return 0 if found else 1


def shown(one: Finding) -> list[str]:
    """A finding as lines of at most WIDTH columns."""
    lines = _wrap(f"{SIGNS[one.level]} {one.check}", one.text)
    return lines + (_wrap("", f"-> {one.cure}") if one.cure else [])


def _wrap(label: str, text: str) -> list[str]:
    pieces = textwrap.wrap(
        " ".join(text.split()), WIDTH - INDENT, break_long_words=False, break_on_hyphens=False
    ) or [""]
    return [
        f"{label if number == 0 else '':<{INDENT}} {piece}".rstrip()
        for number, piece in enumerate(pieces)
    ]
