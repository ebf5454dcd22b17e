"""Post alarms and the end of a run to an address.

No message holds a row's id or text.

A thread of its own sends, so training never waits. A failure is said once and ends nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from glassloop.record.observers import RunInfo, under_policy
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

SCHEMA = 1  # of a message
SENT = ("alarm", "skipped", "out_of_memory", "failed", "stopped", "finished")  # kinds of events
FROM_ENVIRONMENT = "env:"
TIMEOUT_S = 5.0  # of one message
CLOSE_S = 10.0  # for all that is left at the end
MOST_WAITING = 100  # messages; more are dropped
LOCAL = ("localhost", "127.0.0.1", "::1")


def webhook_address(asked: str, environment: Mapping[str, str] = os.environ) -> str:
    """The address that tracking.webhook means.

    Raises:
        ValueError: the named variable is not set, or the address is not https, nor http to this
            machine. The message does not show the address: it is a secret.
    """
    address = asked
    if asked.startswith(FROM_ENVIRONMENT):
        name = asked.removeprefix(FROM_ENVIRONMENT)
        address = environment.get(name, "")
        if not address:
            raise ValueError(
                f"tracking.webhook = {asked}: the environment has no {name}; export {name}=https://..."
            )
    try:
        parts = urlsplit(address)
        host = parts.hostname if parts.port != 0 else None  # raises for what is no number
    except ValueError:
        host = None
    if host is None or not (parts.scheme == "https" or (parts.scheme == "http" and host in LOCAL)):
        raise ValueError(
            "tracking.webhook is not an https:// address (http:// only to localhost): correct it, "
            "or leave it out"
        )
    return address


class WebhookObserver:
    """Sends events of the kinds SENT.

    Args:
        address: from `webhook_address`. run: the run's name. folder: the run's; it is named by
            `run` in messages.
    """

    def __init__(self, address: str, run: str, folder: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self._run, self._folder = address, run, str(folder)
        self._timeout_s = timeout_s
        self._update_ids: list[str] = []
        self._updates = 0
        self._failed = False
        self._waiting: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._send_on, name="webhook", daemon=True)
        self._thread.start()

    def on_start(self, info: RunInfo) -> None:
        self._updates = info.updates

    def on_update(self, record: UpdateRecord, rows: tuple[RowRecord, ...]) -> None:
        self._update_ids = [row.row_id for row in rows]

    def on_machine(self, record: MachineRecord) -> None:
        pass

    def on_probe(self, record: ProbeRecord) -> None:
        pass

    def on_evaluation(self, record: EvaluationRecord) -> None:
        pass

    def on_sample(self, sample: SampleRecord) -> None:
        pass

    def on_event(self, event: Event) -> None:
        if event.kind in SENT:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(json.dumps(self._message(event)).encode())

    def close(self) -> None:
        """Send what is left, for at most CLOSE_S.

        A second call does nothing.
        """
        until = time.monotonic() + CLOSE_S
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(max(0.0, until - time.monotonic()))

    def _message(self, event: Event) -> dict[str, Any]:
        """The message; its `text` is one line, as Slack shows it."""
        said = under_policy(event, "none", self._update_ids).message
        said = said.replace(self._folder, self._run)
        at = f"{event.update}/{self._updates}" if self._updates else str(event.update)
        return {
            "schema": SCHEMA,
            "text": f"{self._run} [{at}] {event.kind}: {said}",
            "run": self._run,
            "update": event.update,
            "updates": self._updates,
            "kind": event.kind,
            "message": said,
        }

    def _send_on(self) -> None:
        opener = urllib.request.build_opener(_NoRedirect)
        while (message := self._waiting.get()) is not None:
            request = urllib.request.Request(
                self._address,
                data=message,
                headers={"Content-Type": "application/json", "User-Agent": "glassloop"},
            )
            try:
                with opener.open(request, timeout=self._timeout_s):
                    pass
            except (OSError, ValueError) as error:  # urllib's and http's errors are OSErrors
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = getattr(error, "code", None) or type(error).__name__
            warnings.warn(
                f"tracking.webhook did not take a message ({reason}); the run continues, and "
                "events.jsonl has every event",
                stacklevel=2,
            )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it could lead to another host, or off https."""

    def redirect_request(self, *_: Any) -> None:
        return None
