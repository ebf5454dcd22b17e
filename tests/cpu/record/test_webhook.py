"""Alarms and the end of a run are posted without rows' ids and text, and never hold a run up."""

from __future__ import annotations

import http.server
import json
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plain_records import ID, TEXT, row_record, update_record

import train_loop
from glassloop.config.arguments import parse
from glassloop.config.names import ConfigError
from glassloop.disk.secrets import command_line, without_secrets
from glassloop.record import webhook
from glassloop.record.observers import RunInfo
from glassloop.record.records import Event
from glassloop.record.webhook import WebhookObserver, webhook_address


class Hook(http.server.HTTPServer):
    """A server on this machine that keeps what it gets, and answers as it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.got: list[dict[str, Any]] = []
        self.code, self.wait_s = 200, 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hook  # type: ignore[assignment]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append({"path": self.path, **json.loads(body)})
        time.sleep(self.server.wait_s)
        self.send_response(self.server.code)
        if self.server.code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook()
    yield server
    server.shutdown()
    server.server_close()


def test_alarms_and_the_end_are_sent_without_ids_text_and_folder(
    hook: Hook, tmp_path: Path
) -> None:
    observer = WebhookObserver(hook.address, "run-a", tmp_path)
    observer.on_start(RunInfo(str(tmp_path), updates=60, ranks=2))
    observer.on_update(update_record(7), (row_record(7),))
    observer.on_event(Event(7, "checkpoint", f"saved {tmp_path}"))
    details = {"row_ids": ["train:99"], "text": TEXT}
    observer.on_event(Event(7, "alarm", f"loss_spike: row {ID} and train:99", None, details))
    observer.on_event(Event(60, "finished", f"run folder {tmp_path}"))
    observer.close()
    observer.close()
    alarm, end = hook.got
    assert alarm["text"] == "run-a [7/60] alarm: loss_spike: row (row) and (row)"
    assert (alarm["schema"], alarm["kind"], alarm["update"], alarm["updates"]) == (
        1,
        "alarm",
        7,
        60,
    )
    assert end["message"] == "run folder run-a"
    everything = json.dumps(hook.got)
    assert ID not in everything and TEXT not in everything and str(tmp_path) not in everything


@pytest.mark.parametrize("code", [302, 404, 500])
def test_a_refusal_or_redirect_is_said_once_and_not_followed(
    hook: Hook, tmp_path: Path, code: int
) -> None:
    hook.code = code
    observer = WebhookObserver(hook.address, "run-a", tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for update in (1, 2):
            observer.on_event(Event(update, "alarm", "x"))
        observer.close()
    assert [one["path"] for one in hook.got] == ["/hook", "/hook"]
    assert [f"({code})" in str(one.message) for one in told] == [True]
    assert hook.address not in str(told[0].message)


def test_a_hook_that_hangs_holds_neither_training_nor_the_end_up(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.wait_s = 3.0
    monkeypatch.setattr(webhook, "CLOSE_S", 0.5)
    observer = WebhookObserver(hook.address, "run-a", tmp_path, timeout_s=0.2)
    began = time.monotonic()
    for update in range(300):
        observer.on_event(Event(update, "alarm", "x"))
    assert time.monotonic() - began < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer.close()
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    "asked",
    ["http://example.com/x", "ftp://localhost/x", "example.com", "https://", "https://x:port/",
     "https://[", "file:///etc/passwd", "http://localhost.evil.com/"],
)  # fmt: skip
def test_other_addresses_are_refused_without_being_shown(asked: str) -> None:
    with pytest.raises(ValueError, match=r"not an https:// address") as refusal:
        webhook_address(asked)
    assert asked not in str(refusal.value) or asked == "https://"


def test_an_address_comes_from_the_environment_on_demand() -> None:
    assert webhook_address("env:HOOK", {"HOOK": "https://example.com/s"}) == "https://example.com/s"
    assert webhook_address("http://localhost:9/x") == "http://localhost:9/x"
    with pytest.raises(ValueError, match=r"the environment has no HOOK; export HOOK="):
        webhook_address("env:HOOK", {})


def test_a_file_of_a_run_cannot_have_messages_sent_and_no_page_shows_the_address(
    tmp_path: Path,
) -> None:
    address = "https://hooks.example.com/s3cret"
    (tmp_path / "config.yaml").write_text(f"tracking:\n  webhook: {address}\n")
    with pytest.raises(ConfigError, match=r"tracking\.webhook stands in .*config\.yaml"):
        parse(["--resume", str(tmp_path)])
    found = parse(["--resume", str(tmp_path), "tracking.webhook=env:HOOK"])
    assert found.tracking.webhook == "env:HOOK"
    assert parse(["--resume", str(tmp_path), "tracking.webhook=null"]).tracking.webhook is None
    assert address not in str(without_secrets({"tracking": {"webhook": address}}))
    assert address not in str(command_line(["train", f"tracking.webhook={address}"]))


def test_a_run_posts_its_end(hook: Hook, run_of: Any) -> None:
    run = run_of(
        schedule={"updates": 2, "warmup_updates": 1},
        execution={"preflight": False},
        tracking={"webhook": hook.address},
    )
    assert train_loop.train(run) == 0
    run.close_observers()
    assert [(one["kind"], one["run"]) for one in hook.got] == [("finished", run.folder.name)]
