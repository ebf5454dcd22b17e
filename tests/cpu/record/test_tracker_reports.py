"""The report reaches Weights & Biases and TensorBoard; trackio gets every value."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_runs import EVIL, write_run
from plain_records import update_record

from glassloop.config import TrackingConfig
from glassloop.record.tracker_checks import check_tracking
from glassloop.record.trackers import TrackerObserver, make_tracker_observer
from glassloop.report.writing import attachment

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "planted")


def started(folder: Path, tracking: TrackingConfig, updates_done: int = 0) -> TrackerObserver:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    check_tracking(tracking)
    accelerator = Accelerator(cpu=True, log_with=list(tracking.to), project_dir=str(folder))
    found = make_tracker_observer(
        accelerator, tracking, {"seed": 1}, folder, "run-a", updates_done=updates_done
    )
    assert found is not None
    return found


def test_page_and_summary_lie_where_the_trackers_keep_them(run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = attachment(run, False)
    assert made is not None
    page, summary = made
    asked = TrackingConfig(to=("wandb", "tensorboard"), wandb_mode="offline")
    observer = started(tmp_path, asked)
    observer.on_update(update_record(40), ())
    observer.attach(page, summary, 40)
    observer.close()
    (html,) = tmp_path.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert html.read_text(encoding="utf-8") == page
    logs = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "tensorboard").iterdir()]
    texts = [
        tensor.tensor_proto.string_val[0].decode()
        for log in logs
        for tag in log.Tags()["tensors"]
        if tag.startswith("report")
        for tensor in log.Tensors(tag)
    ]
    assert texts == [summary]


def test_what_is_sent_has_no_text_and_no_id_unless_asked(run: Path) -> None:
    made = attachment(run, False)
    assert made is not None
    for part in made:
        assert "train:evil" not in part and "window.hacked" not in part
    assert "- **bad** " in made[1]
    whole = attachment(run, True)
    assert whole is not None and "train:evil" in whole[0] and EVIL not in whole[0]


def test_a_folder_that_cannot_be_read_sends_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attachment(tmp_path, False) is None
    assert "not sent: ValueError" in capsys.readouterr().err


def test_a_tracker_that_refuses_the_report_is_given_up_with_a_warning() -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    observer = TrackerObserver({"tensorboard": SimpleNamespace(log=refuses, logging_dir="x")})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        observer.attach("<html>", "text", 3)
        observer.attach("<html>", "text", 3)
    assert len(told) == 1 and "tensorboard failed at update 3" in str(told[0].message)


def test_trackio_keeps_every_value_on_this_disk_and_resumes_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real trackio, where the extra is installed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    asked = TrackingConfig(to=("trackio",), project="proj")
    for done in (0, 2):
        observer = started(tmp_path, asked, updates_done=done)
        for update in (done + 1, done + 2):
            observer.on_update(update_record(update), ())
        assert observer.lines() == ('trackio: trackio show --project "proj"',)
        observer.close()
    (base,) = (tmp_path / "trackio").glob("proj*.db")
    with sqlite3.connect(base) as opened:
        found = opened.execute("select run_name, step from metrics order by step").fetchall()
    assert found == [("run-a", step) for step in (1, 2, 3, 4)]


def test_without_the_package_trackio_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glassloop.record.tracker_checks.package_version", lambda _name: None)
    with pytest.raises(ValueError, match=r"package trackio is not installed: pip install trackio"):
        check_tracking(TrackingConfig(to=("trackio",)))
