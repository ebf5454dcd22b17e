"""Trackers are refused in time and get every value once.

The Weights & Biases runs are real and offline, and read back from their transaction log; so are
TensorBoard's event files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plain_records
import pytest
import torch
from wandb_logs import history, wandb_records

from glassloop.config import TrackingConfig
from glassloop.disk.opening import NotPlain
from glassloop.record.observers import JsonlObserver, RunInfo
from glassloop.record.records import EvaluationRecord, Event, SampleRecord, UpdateRecord
from glassloop.record.tracker_checks import check_tracking
from glassloop.record.tracker_metrics import update_metrics
from glassloop.record.trackers import TrackerObserver, make_tracker_observer

pytestmark = pytest.mark.usefixtures("own_home")

KEY = "0123456789abcdef0123456789abcdef01234567"
TEXT = "the caller asks for a gift card"
ANSWER = "this is a scam"
HOST = "private-host-of-somebody"


def update_record(update: int = 1, **changes: Any) -> UpdateRecord:
    known: dict[str, Any] = {"grad_norm_pre_clip": 1.25, "clip_coef": 0.8}
    known |= {"rank_grad_norm": (0.5, 0.75), "rank_peak_gib": (7.5, 7.625)}
    return plain_records.update_record(update, **(known | changes))


def evaluation(update: int) -> EvaluationRecord:
    scores = {"loss_nats": 2.0, "f1": 0.75, "recall": None}
    return EvaluationRecord(
        update, 2.0, rows=4, supervised_tokens=50, scores=scores, base={"f1": 0.25}, seconds=3.0
    )


def sample(update: int) -> SampleRecord:
    return SampleRecord(
        update, "train:17", False, prompt=TEXT, expected=TEXT, answer=ANSWER, answer_tokens=4
    )


# --- refusals, before a model is loaded


# --- real runs


def start(
    folder: Path, text: Any = "ids", resume_ids: Any = None, updates_done: int = 0
) -> TrackerObserver:
    from accelerate import Accelerator

    tracking = TrackingConfig(to=("wandb", "tensorboard"), project="proj", wandb_mode="offline")
    check_tracking(tracking)
    accelerator = Accelerator(cpu=True, log_with=list(tracking.to), project_dir=str(folder))
    config = {
        "data": {"source": f"https://me:hunter2secret@example.com/?key={KEY}", "max_tokens": 64},
        "heldout": None,
    }
    observer = make_tracker_observer(
        accelerator,
        tracking,
        config,
        folder,
        "run-a",
        resume_ids,
        text=text,
        updates_done=updates_done,
    )
    assert observer is not None
    return observer


def states() -> list[Any]:
    """What a run's numbers and its stop signal depend on."""
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    return [
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
        handlers,
        sys.stdout,
        sys.stderr,
    ]


@dataclasses.dataclass
class Tracked:
    folder: Path
    logs: list[Path]  # wandb's transaction logs, in the order of the starts
    ids: list[dict[str, str]]
    lines: tuple[str, ...]
    state_is_untouched: bool
    everything: bytes  # every byte that trackers wrote


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """Track a run of 5 updates, resumed after 3.

    The second start ends in an error, and has record.text=full.
    """
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "HOME"):
            patch.setenv(name, str(folder.parent / name.lower()))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.delenv("WANDB_MODE", raising=False)
        patch.setattr(socket, "gethostname", lambda: HOST)
        AcceleratorState._reset_state(reset_partial_state=True)
        import wandb  # before the comparison: what importing it does is not what a run does

        before = states()
        first, local = start(folder), JsonlObserver(folder)
        print(f"what a run prints may show rows: {TEXT}")
        lines = first.lines()
        for observer in (local, first):
            observer.on_start(RunInfo(str(folder), updates=60, ranks=2))
        for u in range(1, 6):
            for observer in (local, first):
                observer.on_update(
                    update_record(u, loss_nats=math.nan, action="skipped")
                    if u == 5
                    else update_record(u),
                    (),
                )
        for observer in (local, first):
            observer.on_evaluation(evaluation(5))
            observer.on_sample(sample(5))
            observer.on_event(Event(5, "warning", TEXT))
            observer.close()
        first.close()
        untouched = states() == before
        time.sleep(1.1)  # wandb names a run's folder by the second
        second = start(folder, "full", first.tracker_ids(), updates_done=3)
        try:
            try:
                second.on_update(update_record(4, loss_nats=1.5, attempt=2), ())
                second.on_sample(sample(4))
                raise RuntimeError("a rank is gone")
            finally:
                second.close()
        except RuntimeError:
            pass
        wandb.teardown()  # as at the end of a process: its service has written all it was told
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    written = b"".join(
        p.read_bytes()
        for sub in ("wandb", "tensorboard")
        for p in (folder / sub).rglob("*")
        if p.is_file()
    )
    yield Tracked(
        folder, logs, [first.tracker_ids(), second.tracker_ids()], lines, untouched, written
    )
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_start_makes_one_run_and_a_resume_goes_on_with_it(tracked: Tracked) -> None:
    assert len(tracked.logs) == 2
    runs = [
        next(r.run for r in wandb_records(log) if r.WhichOneof("record_type") == "run")
        for log in tracked.logs
    ]
    assert [run.run_id for run in runs] == [tracked.ids[0]["wandb"]] * 2
    assert tracked.ids[1] == tracked.ids[0]
    assert [(run.project, run.display_name, run.resume) for run in runs] == [
        ("proj", "run-a", False),
        ("proj", "run-a", True),
    ]


def test_every_value_is_on_the_update_axis_and_a_resume_loses_none(tracked: Tracked) -> None:
    metrics = [
        r.metric for r in wandb_records(tracked.logs[0]) if r.WhichOneof("record_type") == "metric"
    ]
    assert ("*", "update") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    lines = [line for log in tracked.logs for line in history(log)]
    assert [line["update"] for line in lines] == [
        1,
        2,
        3,
        4,
        5,
        5,
        4,
        4,
    ]  # updates, evaluation, update again, sample
    steps = [line["_step"] for line in lines]
    assert steps == sorted(
        set(steps)
    )  # wandb drops what does not rise, so the second part stands above the first


def test_values_come_back_as_they_were_recorded(tracked: Tracked) -> None:
    lines = history(tracked.logs[0])
    expected = update_metrics(update_record(1))
    assert {
        name: value
        for name, value in lines[0].items()
        if name != "update" and not name.startswith("_")
    } == expected
    assert lines[4]["train/loss_nats"] in ("NaN", "nan") or math.isnan(
        lines[4]["train/loss_nats"]
    )  # seen, not filtered
    assert lines[4]["train/skipped"] == 1
    assert lines[5]["heldout/f1"] == 0.75
    assert lines[5]["heldout/base/f1"] == 0.25
    assert "heldout/recall" not in lines[5]


def test_tensorboard_has_the_same_values_and_the_redone_update(tracked: Tracked) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.folder / "tensorboard" / "proj")).Reload()
    scalars = {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    assert scalars["train/loss_nats"] == [
        (1, 2.5),
        (2, 2.5),
        (3, 2.5),
        (4, 1.5),
    ]  # 4 was done again, 5 not yet
    assert scalars["rank1/real_tokens"] == [(u, 450.0) for u in (1, 2, 3, 4)]
    assert set(scalars) >= set(update_metrics(update_record()))


def test_the_local_lines_keep_what_a_resume_redoes(tracked: Tracked) -> None:
    assert [json.loads(line)["update"] for line in (tracked.folder / "metrics.jsonl").open()] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_no_secret_host_name_or_row_leaves(tracked: Tracked) -> None:
    assert b"max_tokens" in tracked.everything  # the config is there
    assert b"(hidden)" in tracked.everything
    for secret in (KEY, "hunter2secret"):
        assert secret.encode() not in tracked.everything
    log = tracked.logs[0].read_bytes()
    assert HOST.encode() not in log
    for words in (TEXT, ANSWER, "train:17"):
        assert words.encode() not in log  # record.text=ids
        assert words.encode() in tracked.logs[1].read_bytes()  # record.text=full


def test_no_code_console_or_machine_data_leaves(tracked: Tracked) -> None:
    files = [
        str(path.relative_to(log.parent))
        for log in tracked.logs
        for path in (log.parent / "files").rglob("*")
    ]
    assert files == []
    kinds = {
        record.WhichOneof("record_type") for log in tracked.logs for record in wandb_records(log)
    }
    assert not kinds & {"output", "output_raw", "environment", "files"}


def test_a_run_that_ends_in_an_error_is_marked_failed(tracked: Tracked) -> None:
    codes = [
        [
            record.exit.exit_code
            for record in wandb_records(log)
            if record.WhichOneof("record_type") == "exit"
        ]
        for log in tracked.logs
    ]
    assert codes == [[0], [1]]


def test_trackers_leave_random_numbers_signals_and_streams_alone(tracked: Tracked) -> None:
    assert tracked.state_is_untouched


def test_the_header_says_where_to_look(tracked: Tracked) -> None:
    wandb_line, board_line = tracked.lines
    assert wandb_line == f"Weights & Biases, offline: wandb sync {tracked.logs[0].parent}"
    assert (
        board_line == f"TensorBoard: tensorboard --logdir {tracked.folder / 'tensorboard' / 'proj'}"
    )


# --- one rank, names, failures


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_writes_through_no_link(tmp_path: Path, name: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    main: Any = SimpleNamespace(is_main_process=True, log_with=[name])
    tracking = TrackingConfig(to=(name,), wandb_mode="offline")
    with pytest.raises(NotPlain, match=f"{name} is a link, not a plain folder"):
        make_tracker_observer(main, tracking, {}, tmp_path, "a")


def test_other_ranks_have_no_tracker(tmp_path: Path) -> None:
    other: Any
    main: Any

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("started on another rank")

    other = SimpleNamespace(
        is_main_process=False, init_trackers=refuse, get_tracker=refuse, log_with=[]
    )
    tracking = TrackingConfig(to=("wandb",), wandb_mode="offline")
    assert make_tracker_observer(other, tracking, {}, tmp_path, "a") is None
    main = SimpleNamespace(
        is_main_process=True, init_trackers=refuse, get_tracker=refuse, log_with=[]
    )
    assert make_tracker_observer(main, TrackingConfig(), {}, tmp_path, "a") is None
    with pytest.raises(
        AssertionError, match="log_with=list"
    ):  # Accelerate drops a tracker it does not know, and says nothing
        make_tracker_observer(main, tracking, {}, tmp_path, "a")
