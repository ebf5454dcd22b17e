"""Ranks that disagree end with the name of the collective that they are stuck in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import HERE, launch

from glassloop.formula.dist import NUMBERS

GATE = f"all_gather of {len(NUMBERS) + 1} double (the gate)"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "absent",
            "Stuck in collective 8, all_reduce of 1,024 float (the sum of gradients) of update 3: "
            f"entered by rank 0, not by rank 1; its last was 7, {GATE}.",
        ),
        (
            "another",
            "The ranks disagree about collective 8: rank 0 is in all_reduce of 1,024 float (the "
            "sum of gradients) of update 3, rank 1 is in all_gather of 4 float of update 3.",
        ),
    ],
)
def test_a_stuck_collective_is_named_with_the_ranks_that_entered_it(
    tmp_path: Path, case: str, said: str
) -> None:
    output = launch(HERE / "stuck.py", str(tmp_path), case, expect=1)
    assert said in output, output
    assert "rank 1: update 3" in output
    for rank in (0, 1):
        dump = json.loads((tmp_path / f"ranks/collectives_rank{rank}.json").read_text())
        assert dump["entries"]
