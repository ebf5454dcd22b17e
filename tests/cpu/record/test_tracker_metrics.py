"""Records have the trackers' names; a failing tracker ends no run."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from plain_records import update_record

from glassloop.record.records import Event
from glassloop.record.tracker_metrics import update_metrics
from glassloop.record.trackers import TrackerObserver

pytestmark = pytest.mark.usefixtures("own_home")


def test_the_loss_is_that_of_all_ranks_and_each_counter_has_its_name() -> None:
    values = update_metrics(update_record(rank_peak_gib=(7.5, 7.625)))
    assert values["train/loss_nats"] == 2.5  # (100 x 1.0 + 300 x 3.0) / 400, neither rank's own
    assert (values["rank0/loss_nats"], values["rank1/loss_nats"]) == (1.0, 3.0)
    assert (values["tokens/supervised"], values["tokens/real"], values["tokens/slot"]) == (
        400,
        600,
        2000,
    )
    assert values["speed/real_tokens_per_s_all_ranks"] == 300.0
    for kind, total in (("supervised", 400), ("real", 600), ("slot", 2000)):
        assert sum(values[f"rank{rank}/{kind}_tokens"] for rank in (0, 1)) == total
    assert values["memory/rank1_peak_gib"] == 7.625


def test_what_does_not_exist_is_not_sent() -> None:
    values = update_metrics(
        update_record(
            rank_grad_norm=None, rank_cosine=None, rank_peak_gib=None, rank_loss_nats=(None, 3.0)
        )
    )
    assert not {
        "rank0/grad_norm",
        "train/rank_cosine",
        "memory/rank0_peak_gib",
        "rank0/loss_nats",
        "train/loss_scale",
    } & set(values)
    assert None not in values.values()


class Broken:
    logging_dir = "there"

    def log(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    def finish(self) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_does_not_end_the_run() -> None:
    observer = TrackerObserver({"tensorboard": Broken()})
    with pytest.warns(
        UserWarning,
        match=r"tensorboard failed at update 1 \(ConnectionError: no route to host\); metrics\.",
    ):
        observer.on_update(update_record(1), ())
    with warnings.catch_warnings(action="error"):  # given up: no second warning
        observer.on_update(update_record(2), ())
        observer.close()
    with pytest.warns(UserWarning, match="tensorboard failed at closing"):
        TrackerObserver({"tensorboard": Broken()}).close()


def test_a_failed_event_marks_the_run() -> None:
    codes: list[int] = []
    run = SimpleNamespace(
        id="abc",
        dir="/x/files",
        settings=SimpleNamespace(mode="offline"),
        finish=lambda exit_code: codes.append(exit_code),
    )
    for kind in ("stopped", "failed"):
        observer = TrackerObserver({"wandb": SimpleNamespace(tracker=run)})
        observer.on_event(Event(1, kind, "m"))
        observer.close()
        observer.close()
    assert codes == [0, 1]
