"""Send records to Weights & Biases, TensorBoard and trackio.

wandb's own step only ever grows, so a resumed run that redoes updates would lose them; every metric
is therefore bound to `update`. The packages are imported inside functions.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.config import TrackingConfig
from glassloop.disk.opening import require_plain_folder
from glassloop.disk.secrets import without_secrets
from glassloop.record.jsonl import EVALUATIONS, MACHINE, METRICS, SAMPLES, read_jsonl
from glassloop.record.observers import RunInfo, TextPolicy
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)
from glassloop.record.tracker_metrics import (
    evaluation_metrics,
    machine_metrics,
    probe_metrics,
    update_metrics,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrackerObserver:
    """Sends records to the trackers that were started.

    A tracker that fails is given up with a warning; the run continues.

    Args:
        trackers: Accelerate's trackers by name.
        text: record.text; generated answers are sent under full only, rows' ids never.
        first_step: wandb's own step for the first values; None: wandb's choice.
    """

    def __init__(
        self, trackers: Mapping[str, Any], text: TextPolicy = "ids", first_step: int | None = None
    ) -> None:
        self._trackers = dict(trackers)
        self._text = text
        self._first_step = first_step
        self._failed = False
        self._ids = {"wandb": trackers["wandb"].tracker.id} if "wandb" in trackers else {}
        self._lines = tuple(_where(name, tracker) for name, tracker in trackers.items())

    def tracker_ids(self) -> dict[str, str]:
        """Return the ids that continue this run after a resume.

        Give them to `make_tracker_observer` as `resume_ids`.
        """
        return dict(self._ids)

    def lines(self) -> tuple[str, ...]:
        """Return one line a tracker: where to look."""
        return self._lines

    def tell_config(self, config: Mapping[str, Any]) -> None:
        """Replace the config that the trackers were started with. TensorBoard keeps both."""
        shown = without_secrets(dict(config))
        for name, tracker in list(self._trackers.items()):
            try:
                if name == "wandb":
                    tracker.tracker.config.update(shown, allow_val_change=True)
                elif name == "trackio":
                    tracker.store_init_configuration(shown)
                else:
                    tracker.log({"config": f"```\n{json.dumps(shown, indent=2)}\n```"}, step=0)
            except Exception as error:  # as in _log: the run's own files say it all the same
                del self._trackers[name]
                _warn(name, "the config", error)

    def on_start(self, info: RunInfo) -> None:
        pass

    def on_update(self, record: UpdateRecord, rows: tuple[RowRecord, ...]) -> None:
        self._log(update_metrics(record), record.update)

    def on_machine(self, record: MachineRecord) -> None:
        self._log(machine_metrics(record), record.update)

    def on_probe(self, record: ProbeRecord) -> None:
        self._log(probe_metrics(record), record.update)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._log(evaluation_metrics(record), record.update)

    def on_sample(self, sample: SampleRecord) -> None:
        if self._text != "full":
            return
        who = "base" if sample.base else "adapter"
        self._log(
            {f"samples/{who}/{sample.row_id}": f"{sample.prompt or ''}\n\n{sample.answer}"},
            sample.update,
        )

    def on_event(self, event: Event) -> None:
        self._failed = self._failed or event.kind == "failed"

    def attach(self, page: str, summary: str, update: int) -> None:
        """Send the run's report: the page to wandb, the summary to TensorBoard.

        Args:
            page: an HTML file. summary: Markdown.
        """
        if "wandb" in self._trackers:
            import wandb

            self._log_to("wandb", {"report": wandb.Html(page, inject=False)}, update)
        if "tensorboard" in self._trackers:
            self._log_to("tensorboard", {"report": summary}, update)

    def close(self) -> None:
        """End the trackers' runs; a second call does nothing.

        They end as failed after a "failed" event, or with an exception on its way.
        """
        failed = self._failed or sys.exc_info()[0] is not None
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                if name == "wandb":
                    tracker.tracker.finish(exit_code=int(failed))
                else:
                    tracker.finish()
            except (
                Exception
            ) as error:  # whatever a tracker does at its end, the trained adapter comes first
                _warn(name, "closing", error)

    def _log(self, values: Mapping[str, float | int | str], update: int) -> None:
        for name in list(self._trackers):
            self._log_to(name, values, update)

    def _log_to(self, name: str, values: Mapping[str, Any], update: int) -> None:
        tracker = self._trackers[name]
        try:
            if name == "wandb":
                step, self._first_step = self._first_step, None
                tracker.tracker.log({**values, "update": update}, step=step, commit=True)
            else:
                tracker.log(dict(values), step=update)
        except Exception as error:  # network, disk or a bug there: metrics.jsonl has every value
            del self._trackers[name]
            _warn(name, f"update {update}", error)


def make_tracker_observer(
    accelerator: Accelerator,
    tracking: TrackingConfig,
    config_dict: Mapping[str, Any],
    folder: Path,
    run_name: str,
    resume_ids: Mapping[str, str] | None = None,
    *,
    text: TextPolicy = "ids",
    updates_done: int = 0,
) -> TrackerObserver | None:
    """Start the trackers of `tracking.to` on rank 0.

    Returns None on other ranks, and if no tracker is asked for.

    wandb gets no console output (it may show rows), no host name, no code and no git state; config
    goes out without secrets.

    Args:
        accelerator: made with `log_with=list(tracking.to)`, and with a `project_dir` where there is
            a tracker.
        config_dict: the resolved config as plain JSON values.
        folder: the run's folder; trackers write below it.
        run_name: name of the run in wandb.
        resume_ids: `tracker_ids()` of the resumed run; None: a new run.
        text: record.text.
        updates_done: updates of the earlier start that count; TensorBoard hides what came after
            them.
    """
    if not tracking.to or not accelerator.is_main_process:
        return None
    asked = tuple(dict.fromkeys(tracking.to))
    for name in asked:
        require_plain_folder(Path(folder) / name)  # where it writes
    assert {str(name) for name in accelerator.log_with} == set(asked), (
        "Accelerator(log_with=list(tracking.to), project_dir=...)"
    )
    accelerator.project_configuration.logging_dir = str(Path(folder) / "tensorboard")
    shown = without_secrets(dict(config_dict))
    resume_id = (resume_ids or {}).get("wandb")
    kwargs: dict[str, Any] = {}
    if "wandb" in asked:
        kwargs["wandb"] = _wandb_arguments(tracking, shown, Path(folder), run_name, resume_id)
    if "trackio" in asked:
        kwargs["trackio"] = {
            "name": run_name,
            "config": shown,
            "resume": "allow" if updates_done else "never",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }
    if "tensorboard" in asked and updates_done:
        kwargs["tensorboard"] = {"purge_step": updates_done + 1}
    accelerator.init_trackers(tracking.project, init_kwargs=kwargs)
    trackers: dict[str, Any] = {name: accelerator.get_tracker(name) for name in asked}
    first_step = None
    if "wandb" in trackers:
        run = trackers["wandb"].tracker
        run.define_metric("update")
        run.define_metric("*", step_metric="update")
        if (
            resume_id and tracking.wandb_mode == "offline"
        ):  # the earlier part is on this disk only: continue above its steps
            first_step = _records_in(Path(folder)) + 1
    if "tensorboard" in trackers:
        trackers["tensorboard"].log(
            {"config": f"```\n{json.dumps(shown, indent=2)}\n```"}, step=updates_done
        )
    return TrackerObserver(trackers, text, first_step)


def _wandb_arguments(
    tracking: TrackingConfig, config: Any, folder: Path, run_name: str, resume_id: str | None
) -> dict[str, Any]:
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        save_code=False,
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    return {
        "dir": str(folder),
        "mode": tracking.wandb_mode,
        "name": run_name,
        "id": resume_id,
        "resume": "allow" if resume_id else None,
        "config": config,
        "settings": settings,
    }


def _records_in(folder: Path) -> int:
    """Count lines of the run's files.

    There are at least as many as there were calls of wandb's log.
    """
    paths = [folder / name for name in (METRICS, MACHINE, EVALUATIONS, SAMPLES)]
    return sum(len(read_jsonl(path)) for path in paths if os.path.lexists(path))


def _where(name: str, tracker: Any) -> str:
    if name == "trackio":
        return f'trackio: trackio show --project "{tracker.run_name}"'
    if name == "tensorboard":
        return f"TensorBoard: tensorboard --logdir {tracker.logging_dir}"
    run = tracker.tracker
    offline = run.settings.mode == "offline"
    return (
        f"Weights & Biases, offline: wandb sync {Path(run.dir).parent}"
        if offline
        else f"Weights & Biases: {run.url}"
    )


def _warn(name: str, when: str, error: Exception) -> None:
    warnings.warn(
        f"{name} failed at {when} ({type(error).__name__}: {error}); metrics.jsonl has every value",
        stacklevel=3,
    )
