"""A study whose cells are written, not trained.

Its folder and the repository's stand in PYTHONPATH.

python study_stand_in.py study FILE ...   is `glassloop study FILE ...` with such cells
python study_stand_in.py --config FILE    is one of them: lora.r = 13 ends with exit code 3,
                                          lora.r = 66 diverges, others end well
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from made_runs import write_run

from glassloop.cli import study as cli
from glassloop.config.arguments import from_values, parse, to_yaml
from glassloop.disk.publish import write_text
from glassloop.record.records import Event, to_json
from glassloop.study import running

FILE = """
name: stood_in
question: Do the stand-ins part?
base: data.rows=32 schedule.updates=8 schedule.warmup_updates=1
axes:
  lora.r: [4, 8]
seeds: [1, 2, 3]
measure: [loss, stability]
claims:
  - says: a higher rank ends lower
    quantity: heldout_loss
    cell: {lora.r: 8}
    against: {lora.r: 4}
    expect: lower
"""


def install() -> None:
    """From here on a study's cells are stand-ins."""

    def command(cell, out: Path) -> list[str]:
        asked = out / "asked" / f"{cell.name}.yaml"
        asked.parent.mkdir(parents=True, exist_ok=True)
        write_text(asked, to_yaml(cell.config))
        return [sys.executable, __file__, "--config", str(asked)]

    running.command = command


def cell(words: list[str]) -> int:
    config = parse(words)
    r, seed = config.lora.r, config.seed
    if r == 13:
        print("the stand-in ran out of luck")
        return 3
    folder = Path(config.run.dir) / str(config.run.name)
    updates = config.schedule.updates or 8
    # rank 8 ends 0.1 below rank 4, give or take 0.001; seeds lie 1 apart
    offset = seed - (0.1 if r == 8 else 0.0) + 0.001 * (seed % 2) * (r == 8)
    made = (
        Path(config.run.dir).parent / "made" / folder.name
    )  # then moved: a run's folder has its own config from the beginning
    write_run(
        made,
        updates=40 if r == 66 else updates,
        ranks=1,
        seed=seed,
        faults=r == 66,
        end=None,
        raised=(99, offset),
    )
    write_text(made / "config.yaml", to_yaml(from_values(config.model_dump(mode="json"))))
    (made / "checkpoints" / "update_000008").mkdir(parents=True)
    folder.parent.mkdir(exist_ok=True)
    made.rename(folder)
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    with open(folder / "events.jsonl", "a") as file:
        file.write(to_json(Event(updates, "failed" if r == 66 else "finished", "the end")) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "study":
        install()
        sys.exit(cli.main(sys.argv[2:]))
    sys.exit(cell(sys.argv[1:]))
