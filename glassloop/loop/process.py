"""The surroundings of a run in its process.

Refusals, the ways to end, exit codes, the last line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from glassloop.base.card_errors import first_line, lacks_memory
from glassloop.formula.dist import leave
from glassloop.loop.guard import Guard, say, say_once_a_host
from glassloop.loop.replica import ReplicasDiffer, SharedPassFailed
from glassloop.loop.run import Run
from glassloop.loop.signals import StoppedEarly
from glassloop.plan.contract import ContractBroken
from glassloop.record.printable import refusal

CLOSE_S = 60.0  # for what closes a run: files, watchdog, process group
TRACKERS_S = 300.0  # the same with trackers, which may have much to send
REPORT_S = 300.0


def begun(guard: Guard, build: Callable[[], Run]) -> Run | int:
    """The run that `build` makes, or an exit code.

    2 if refused, 130 or 1 if stopped.
    """
    try:
        guard.starts()
        try:
            run = build()
        except (ValueError, OSError, ContractBroken) as error:
            if os.environ.get("GLASSLOOP_TRACEBACK"):
                raise
            leave()
            say_once_a_host(refusal(error))  # hosts may refuse differently
            return 2
        except RuntimeError as error:
            if not lacks_memory(error) or os.environ.get("GLASSLOOP_TRACEBACK"):
                raise
            say(refusal(no_room(error)))  # each rank has a card of its own
            leave()
            return 2
        guard.begins()
        return run
    except StoppedEarly as why:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"stopped by {why} before the first update: nothing was trained")
        guard.code = guard.stop.exit_code or 1
        leave()
        return guard.code


def no_room(error: RuntimeError) -> str:
    """Word a lack of memory before the first update."""
    rank = os.environ.get("RANK", "0")
    return (
        f"the card of rank {rank} has no memory left, before the first update: "
        f"{first_line(error)}. See what else runs there (nvidia-smi); or set memory.base=host "
        "memory.profile=min with execution.engine=fused, or take a smaller model.id or lora.r. "
        "glassloop plan says what a run needs"
    )


def carried_out(
    run: Run,
    guard: Guard,
    train: Callable[[Run], int],
    report: Callable[[Path], None],
    attachment: Callable[[Path, bool], tuple[str, str] | None],
) -> int:
    """Train, then close everything, each part within its time.

    Returns the exit code.

    Args:
        report: writes the run's page into its folder.
        attachment: makes page and summary for trackers; with row ids and texts if the flag is set.
    """
    code = 1
    try:
        code = train(run)
    except (ContractBroken, ReplicasDiffer, SharedPassFailed) as error:
        code = run.broken(error)
    except OSError as error:  # the disk takes not even a line: nobody could follow the run
        if os.environ.get("GLASSLOOP_TRACEBACK"):
            raise
        say(f"\nended: {error}")
    except RuntimeError as error:
        if (lost := run.lost(error)) is None:
            raise
        say(f"\n{lost}")
        os._exit(1)  # without the others, the process group could not even be left
    finally:
        guard.code = code
        if run.attach is not None and run.config.tracking.report != "none":
            with guard.within(REPORT_S, "sending the report to trackers"):
                made = attachment(run.folder, run.config.tracking.report == "full")
                if made is not None:
                    run.attach(*made, run.at)
        with guard.within(TRACKERS_S if run.config.tracking.to else CLOSE_S, "closing the run"):
            run.close()
    if run.replica.rank == 0:
        with guard.within(REPORT_S, "writing the report"):
            report(run.folder)
        if run.last_line:
            say(run.last_line)
    return code
