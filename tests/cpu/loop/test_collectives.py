"""Dumps of the flight recorder are read with care and told in one sentence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from glassloop.loop import collectives
from glassloop.loop.collectives import asked, calls_of, dump_of, parsed, sentence, stuck_in
from glassloop.loop.watchdog import WAITS, Watchdog

SUM = "all_reduce of 1,024 float (the sum of gradients)"


def entry(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "collective_seq_id": number, "pg_id": 0, "is_p2p": False, "state": "scheduled",
        "profiling_name": "nccl:all_reduce", "input_sizes": [[32, 32]], "input_dtypes": ["Float"],
    } | changes  # fmt: skip


def dumped(done: int, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"entries": list(entries), "pg_status": {"0": {"last_completed_collective": str(done)}}}


GATE = entry(7, profiling_name="nccl:all_gather", input_sizes=[[23]], input_dtypes=["Double"])


def test_a_rank_that_never_came_is_named_with_its_last_collective() -> None:
    told = [parsed(dumped(7, GATE, entry(8)), 0), parsed(dumped(7, GATE), 1)]
    assert sentence(told, 2, {0: 3, 1: 3}) == (
        f"Stuck in collective 8, {SUM} of update 3: entered by rank 0, not by rank 1; its last "
        "was 7, all_gather of 23 double (the gate)"
    )


def test_ranks_in_different_collectives_are_each_named() -> None:
    other = entry(8, profiling_name="nccl:broadcast", input_sizes=[[]])
    told = [parsed(dumped(7, GATE, entry(8)), 0), parsed(dumped(7, GATE, other), 1)]
    said = sentence(told, 2, {0: 3})
    assert said.startswith("The ranks disagree about collective 8: rank 0 is in all_reduce of 1,0")
    assert said.endswith("rank 1 is in broadcast of 1 float (rank 0's norm)")


def test_other_sizes_are_a_disagreement_too() -> None:
    dumps = [dumped(0, entry(1, input_sizes=[[size]])) for size in (4, 5)]
    told = [parsed(one, rank) for rank, one in enumerate(dumps)]
    assert sentence(told, 2, {}).startswith("The ranks disagree about collective 1")


def test_a_silent_rank_and_a_collective_that_all_entered_are_told() -> None:
    assert sentence([parsed(dumped(7, entry(8)), 1)], 3, {}).endswith(
        "entered by rank 1, rank 0, 2 does not answer"
    )
    both = [parsed(dumped(7, entry(8)), rank) for rank in (0, 1)]
    assert sentence(both, 2, {}).endswith("entered by rank 0, 1")
    ended = [parsed(dumped(8, entry(8, state="completed")), rank) for rank in (0, 1)]
    assert sentence(ended, 2, {}) == (
        "No rank is inside a collective: the last one that ended is number 8"
    )
    assert sentence([], 2, {}) == ""


def test_only_the_default_group_counts_and_nccl_tells_of_ends_by_state() -> None:
    calls = parsed(
        dumped(-1, entry(1, state="completed"), entry(9, pg_id=1), entry(8, is_p2p=True)), 0
    )
    assert (calls.done, set(calls.entered)) == (1, {1})


def test_a_retired_collective_has_ended_although_its_number_lags_behind() -> None:
    """gloo's threads finish 6 and 7 almost together, and 6 may be written last."""
    told = [
        parsed(dumped(last, GATE | {"retired": True}, entry(8, retired=False)), rank)
        for rank, last in enumerate((7, 6))
    ]
    assert sentence(told, 2, {}).startswith("Stuck in collective 8")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"entries": 3}', "[" * 10_000, '{"entries": [{}], "pg_status": 1}']
)
def test_a_damaged_dump_counts_as_no_answer(tmp_path: Path, text: str) -> None:
    dump_of(tmp_path, 1).write_text(text)
    assert calls_of(tmp_path, 1) is None
    assert calls_of(tmp_path, 0) is None


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(json.dumps(dumped(1, entry(2))))
    dump_of(tmp_path, 1).symlink_to(tmp_path / "elsewhere")
    assert calls_of(tmp_path, 1) is None


def test_dumps_of_an_earlier_start_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time()
    monkeypatch.setattr(collectives, "dump", lambda: json.dumps(dumped(7, entry(8))).encode())
    dump_of(tmp_path, 1).write_text(json.dumps(dumped(7, entry(8))))
    os.utime(dump_of(tmp_path, 1), (began - 60, began - 60))
    assert not asked(tmp_path, 2, began)
    said = stuck_in(tmp_path, 0, 2, began - 1, {0: 3}, wait_s=0)
    assert said == (
        f" Stuck in collective 8, {SUM} of update 3: entered by rank 0, rank 1 does not answer."
    )
    assert asked(tmp_path, 2, began - 1)


def test_a_collective_that_the_process_group_gave_up_is_named_although_it_counts_as_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = dumped(8, GATE, entry(8, retired=True))
    monkeypatch.setattr(collectives, "dump", lambda: json.dumps(ended).encode())
    said = [
        stuck_in(tmp_path, 0, 2, time.time() - 1, {0: 3}, wait_s=0, failed=failed)
        for failed in (True, False)
    ]
    assert said[0] == (
        f" Stuck in collective 8, {SUM} of update 3: entered by rank 0, rank 1 does not answer."
    )
    assert said[1].startswith(" No rank is inside a collective")


def test_a_torch_that_does_not_tell_leaves_the_message_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "dump", lambda: None)
    dog = Watchdog(tmp_path, 0, 2, timeout_s=60, asked_to_stop=lambda: False)
    dog.folder.mkdir(parents=True)
    dog.does(7, WAITS)
    dog._write()
    said = dog.lost(RuntimeError("Timed out"), wait_s=0)
    assert said is not None and "it ends, and nothing is saved. Last seen: rank 0" in said


def test_a_recorder_that_somebody_set_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(collectives.SIZE, "9")
    collectives.record_collectives()
    assert os.environ[collectives.SIZE] == "9"
    monkeypatch.delenv(collectives.SIZE)
    collectives.record_collectives()
    assert os.environ[collectives.SIZE] == collectives.KEPT
    monkeypatch.setenv(collectives.SIZE, "0")  # undone with the rest


def test_a_wait_that_ends_while_the_others_are_asked_ends_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(tmp_path, 0, 2, timeout_s=60, asked_to_stop=lambda: False)
    ended: list[str] = []
    monkeypatch.setattr(dog, "_end", ended.append)
    dog.does(7, WAITS)
    waited = dog.waited_s()
    monkeypatch.setattr(dog, "_stuck", lambda _: dog.does(7, "steps") or " Stuck.")
    dog._end_stuck("rank 0 has waited.", [], waited + 1e-9)
    assert ended == []
    dog.does(7, WAITS)
    monkeypatch.setattr(dog, "_stuck", lambda _: " Stuck.")
    dog._end_stuck("rank 0 has waited.", [], 0.0)
    assert ended == [
        "rank 0 has waited. Stuck. Last seen: . Go on from the last checkpoint with --resume"
    ]
