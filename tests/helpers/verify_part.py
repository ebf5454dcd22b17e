"""`glassloop verify` on a part of its class.

The part holds each shape once, and all mutants.

`python -m verify_part command ARGUMENTS` is the command. `python -m verify_part FOLDER` is its
worker. The whole class has most shapes on several bases and engines.
"""

from __future__ import annotations

import sys
from pathlib import Path

from glassloop.verify import processes, worker
from glassloop.verify.members import SHAPES, TASKS, Member, members, reference_of
from glassloop.verify.mutants import MUTANTS

REFERENCES = [reference_of(task) for task in TASKS]
SOUND = [mutant.sound for mutant in MUTANTS]


def in_part(member: Member) -> bool:
    """Whether the part holds it.

    Shapes that every engine has take turns with the base: one in NF4, the next one unquantised.
    """
    if member in REFERENCES or member in SOUND:
        return True
    if SHAPES[member.shape].needs_fused:
        return member.task == "nf4"
    turn = ("nf4", "plain")[list(SHAPES).index(member.shape) % 2]
    return (member.engine, member.task) == ("peft", turn)


def part() -> list[Member]:
    """Members of the part, in the order of the table."""
    return [member for member in members() if in_part(member)]


if __name__ == "__main__":
    if sys.argv[1] == "command":
        from glassloop.cli.verify import main

        processes.WORKER = "verify_part"
        sys.exit(main(sys.argv[2:]))
    worker.members = part
    worker.main(Path(sys.argv[1]))
