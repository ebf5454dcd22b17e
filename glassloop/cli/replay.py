"""Re-run a recorded update: compare, find the cause, try cures."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.config.options import Options

if TYPE_CHECKING:
    from glassloop.replay.bisect import Bisection
    from glassloop.replay.reproduce import Reproduction
    from glassloop.replay.start import Opened
    from glassloop.replay.trials import Trials

MAY_CHANGE = {  # fields that say where things are, or how they are computed with the same result
    "model.id",
    "model.revision",
    "model.cache_dir",
    "model.trust_remote_code",
    "data.source",
    "data.revision",
    "execution.checkpointing",
    "execution.deterministic",
}
SCHEMA = 1


def main(argv: list[str]) -> int:
    """`glassloop replay RUN --update N [--bisect] [--try] [--json]`.

    Exit code 0: the record reproduces; 1: it does not.
    """
    own = Options(
        prog="glassloop replay",
        allow_abbrev=False,
        description="Re-run a recorded update on one process, from its capsule, the nearest "
        "earlier checkpoint, or the beginning.",
        epilog="Fields that may be given as section.field=VALUE if files have moved: "
        f"{', '.join(sorted(MAY_CHANGE))}.",
    )
    own.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run, or of one of its capsules"
    )
    own.add_argument(
        "--update", type=int, metavar="N", help="which update; of a capsule's folder, its own"
    )
    own.add_argument(
        "--bisect",
        action="store_true",
        help="walk rank, pass, row, layer and token to what stands out",
    )
    own.add_argument(
        "--try",
        dest="trials",
        action="store_true",
        help="again without the row, in fp32, ...; and a verdict",
    )
    own.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    own.add_argument(
        "--base", metavar="MODEL", help="where the base model is now (short for model.id=MODEL)"
    )
    given, fields = own.parse_known_args(argv)
    overrides = read_fields(fields) | ({"model.id": given.base} if given.base else {})
    return replay(
        given.run,
        given.update,
        overrides,
        bisected=given.bisect,
        tried=given.trials,
        as_json=given.json,
    )


def read_fields(words: Sequence[str]) -> dict[str, str]:
    """{"model.id": "/models/base"} of section.field=VALUE words.

    Raises ValueError for a field that a replay cannot change.
    """
    fields = {}
    for word in words:
        if word.startswith("-") and "." not in word:
            raise ValueError(
                f"{word} is no option of glassloop replay: see glassloop replay --help"
            )
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals or name not in MAY_CHANGE:
            raise ValueError(
                f"{word}: a replay repeats the update as it was recorded, so only "
                f"{', '.join(sorted(MAY_CHANGE))} can be given; --try varies lr, precision, "
                "optimizer and engine"
            )
        fields[name] = value
    return fields


def replay(
    where: Path,
    update: int | None,
    overrides: dict[str, str],
    *,
    bisected: bool,
    tried: bool,
    as_json: bool,
) -> int:
    """Replay and print; return the exit code.

    Raises:
        ValueError: it cannot be replayed.
    """
    from glassloop.loop.launch import hush
    from glassloop.replay import prose as text
    from glassloop.replay.progress import Progress, silent
    from glassloop.replay.reproduce import reproduce

    if not where.is_dir():
        raise ValueError(
            f"RUN = {where} is no folder: name a run's folder (runs/NAME), or one of its capsules"
        )
    hush(1)
    from glassloop.replay.start import open_scene

    def say(lines: str | Sequence[str]) -> None:
        if not as_json:
            print(lines if isinstance(lines, str) else "\n".join(lines), flush=True)

    opened = open_scene(where, update, overrides, lambda line: say(text.progress(line)))
    say(text.opening(opened))
    reproduction = reproduce(opened.scene)
    say(text.reproduction(opened, reproduction))
    found = trials = None
    if bisected or tried:
        from glassloop.replay.bisect import bisect

        progress = Progress("bisect", sys.stderr)
        found = bisect(opened.scene, opened.healthy, silent if as_json else progress)
        progress.close()
    if found is not None and bisected:
        say(text.bisection(opened, found, decoder(opened)))
    if found is not None and tried:
        from glassloop.replay.trials import try_out

        floor = max(reproduction.loss_floor, reproduction.norm_floor)
        progress = Progress("try", sys.stderr)
        told = silent if as_json else progress
        trials = try_out(opened.scene, opened.config, found, opened.usual, floor, told)
        progress.close()
        say(text.trials(opened, trials))
    conclusion = text.conclusion(opened, reproduction, found if bisected else None, trials)
    command = next_command(where, opened, found if bisected else None, trials)
    if as_json:
        print(
            json.dumps(
                as_object(
                    opened, reproduction, found if bisected else None, trials, conclusion, command
                )
            )
        )
    else:
        say(["", *text.wrapped("verdict", conclusion), f"next      {command}"])
    return 0 if reproduction.reproduces is not False else 1


def decoder(opened: Opened) -> Any:
    """Token ids to text, under record.text = full only; None otherwise."""
    if opened.text != "full":
        return None
    from glassloop.base.tokenizer import load_tokenizer

    return load_tokenizer(opened.config.model).decode


def next_command(
    where: Path, opened: Opened, found: Bisection | None, trials: Trials | None
) -> str:
    """Return the command to type next."""
    update = opened.scene.update
    own = f"glassloop replay {shlex.quote(str(where))} --update {update}"
    if trials is None:
        return f"{own} --try" if found is not None else f"{own} --bisect"
    kind = trials.verdict.kind
    if trials.verdict.earlier and update > 1 and not (where / "capsule.json").exists():
        return f"glassloop replay {shlex.quote(str(where))} --update {update - 1} --bisect --try"
    start = f"{_launch(opened)} --config {shlex.quote(str(run_folder(where) / 'config.yaml'))}"
    before = checkpoint_before(run_folder(where), update)
    go_on = f"{_launch(opened)} --resume {shlex.quote(str(run_folder(where)))} --at {before}"
    return {
        "data": f"{go_on} --without-window {update}",
        "precision": f"{go_on} execution.precision=fp32",
        "engine": f"{start} run.name=NEW execution.engine=peft model.attention=eager",
        "optimizer": f"{start} run.name=NEW optimizer.name=adamw",
        "lr": f"{start} run.name=NEW optimizer.lr={opened.config.optimizer.lr / 2:g}",
    }.get(kind, "glassloop verify")


def _launch(opened: Opened) -> str:
    from glassloop.loop.commands import launch_command
    from glassloop.loop.launch import on_cuda

    return launch_command(opened.scene.ranks, on_cuda=on_cuda())


def run_folder(where: Path) -> Path:
    """Find a folder's run: itself, or two levels above a capsule."""
    return where.resolve().parent.parent if (where / "capsule.json").exists() else where


def checkpoint_before(folder: Path, update: int) -> int:
    """Updates done at the newest checkpoint before `update`; 0 without one."""
    names = [
        path.name.removeprefix("update_") for path in (folder / "checkpoints").glob("update_*")
    ]
    return max((int(name) for name in names if name.isdigit() and int(name) < update), default=0)


def as_object(
    opened: Opened,
    done: Reproduction,
    found: Bisection | None,
    trials: Trials | None,
    conclusion: str,
    command: str,
) -> dict[str, Any]:
    """Write the replay as plain JSON types, with "nan" and "inf"."""
    from dataclasses import asdict

    from glassloop.saved.capsule_facts import finite_or_text

    scene = opened.scene
    first = {name: value for name, value in vars(done.first).items() if name != "rng_after"}
    compared = [asdict(one) | {"reproduces": one.reproduces} for one in done.compared]
    walk = None if found is None else asdict(found)
    if walk is not None and opened.text == "none":
        walk["tokens"] = [
            {name: value for name, value in token.items() if name != "token_id"}
            for token in walk["tokens"]
        ]
    return finite_or_text(
        {
            "schema": SCHEMA,
            "update": scene.update,
            "origin": scene.origin,
            "updates_rerun": [asdict(one) for one in opened.on_the_way],
            "notes": opened.notes,
            "usual": None
            if opened.usual is None
            else {"loss_nats": opened.usual[0], "grad_norm": opened.usual[1]},
            "replayed": first,
            "noise_floor": {
                "loss": done.loss_floor,
                "grad_norm": done.norm_floor,
                "gradient": done.grad_floor,
            },
            "reproduces": done.reproduces,
            "bit_for_bit": done.bit_for_bit,
            "compared": compared,
            "bisection": walk,
            "trials": None if trials is None else asdict(trials),
            "conclusion": conclusion,
            "next": command,
        }
    )
