"""The observer interface, and the observer that writes the folder.

An observer is a plain object with the methods of `Observer`. Only rank 0 has observers, and none
may change what is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from glassloop.disk.opening import open_plain
from glassloop.disk.publish import make, named, sync
from glassloop.record.jsonl import (
    EVALUATIONS,
    EVENTS,
    KINDS,
    MACHINE,
    METRICS,
    PROBES,
    ROWS,
    SAMPLES,
    mend,
    read_jsonl,
)
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
    to_json,
)

TextPolicy = Literal["none", "ids", "full"]
CURE = "free space or mend its permissions, then continue with --resume"  # of a file of the run

ID_KEYS = {
    "row_id",
    "row_ids",
    "rows",
}  # keys of an event's details that hold ids of rows ("rows" may also be a count)
TEXT_KEYS = {
    "text",
    "texts",
    "prompt",
    "answer",
    "expected",
}  # keys of an event's details that hold their text


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run begins or is taken up again."""

    folder: str
    updates: int  # updates of the whole run
    ranks: int
    updates_done: int = 0  # updates of an earlier start that count; 0 for a new run
    lines: tuple[str, ...] = ()  # header for people: what was asked, how it is executed


class Observer(Protocol):
    def on_start(self, info: RunInfo) -> None: ...
    def on_update(self, record: UpdateRecord, rows: tuple[RowRecord, ...]) -> None: ...
    def on_machine(self, record: MachineRecord) -> None: ...
    def on_probe(self, record: ProbeRecord) -> None: ...
    def on_evaluation(self, record: EvaluationRecord) -> None: ...
    def on_sample(self, sample: SampleRecord) -> None: ...
    def on_event(self, event: Event) -> None: ...
    def close(self) -> None: ...


class JsonlObserver:
    """Writes records into the run's folder as they come.

    A line stands whole in its file as soon as the call returns.

    A line is one write of the operating system, so a killed process loses none; power loss may lose
    what came after the last `sync`, which is called before a checkpoint is saved and at its event.
    A torn last line that an earlier process left behind is mended on opening.

    Args:
        folder: the run's folder; made if missing.
        text: record.text. none: no id and no text of a row in any file. ids: ids. full: ids and
            text.
        row_text: a row's text by its id; needed under full.
        check: called before each write; raises OSError where the folder is another one by now.

    Raises:
        OSError: a file cannot be opened or written; the message names it. The file is left
            parseable.
        ValueError: a file of the folder is damaged, a link, or was written by a newer glassloop.
    """

    def __init__(
        self,
        folder: Path,
        text: TextPolicy = "ids",
        row_text: Callable[[str], str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        assert text != "full" or row_text is not None, "record.text=full needs row_text"
        self._text: TextPolicy = text
        self._row_text = row_text
        self._check = check
        self._folder = Path(folder)
        with named(self._folder, CURE):
            make(self._folder)
        every = [self._folder / name for name in KINDS]
        for path in every:  # all of them, before the first is written
            with named(path, CURE), contextlib.suppress(FileNotFoundError):
                os.close(open_plain(path, os.O_WRONLY))
        for path in every:
            with named(path, CURE):
                mend(path)
        self._attempts = _attempts(self._folder, (METRICS, ROWS))
        self._evaluation_attempts = _attempts(self._folder, (EVALUATIONS,))
        names = [METRICS, MACHINE, PROBES, EVENTS, EVALUATIONS]
        names += [] if text == "none" else [ROWS, SAMPLES]
        self._files: dict[str, int] = {}  # descriptors by name
        self._update_ids: list[str] = []  # rows of the last update, which its events may name
        for name in names:
            with named(self._folder / name, CURE):
                self._files[name] = open_plain(
                    self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT
                )
        with named(self._folder, CURE):
            sync(self._folder)  # their names

    def attempt(self, update: int) -> int:
        """Return the attempt of `update` in this process.

        It is 1, and one more each time that a resumed run repeats the update.
        """
        return self._attempts.get(update, 0) + 1

    def evaluation_attempt(self, update: int) -> int:
        """Return the attempt of an evaluation after `update` updates.

        It may be repeated where the update is not.
        """
        return self._evaluation_attempts.get(update, 0) + 1

    def on_start(self, info: RunInfo) -> None:
        pass

    def on_update(self, record: UpdateRecord, rows: tuple[RowRecord, ...]) -> None:
        self._update_ids = [row.row_id for row in rows]
        if self._text == "none":
            reason = record.reason and _without_ids(record.reason, self._update_ids)
            record = dataclasses.replace(record, reason=reason)
        elif rows:
            self._append(ROWS, [self._row_line(row) for row in rows])
        self._append(
            METRICS, [to_json(record)]
        )  # last: where it stands, the update's rows stand too

    def on_machine(self, record: MachineRecord) -> None:
        self._append(MACHINE, [to_json(record)])

    def on_probe(self, record: ProbeRecord) -> None:
        self._append(PROBES, [to_json(record)])

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._append(EVALUATIONS, [to_json(record)])

    def on_sample(self, sample: SampleRecord) -> None:
        if self._text == "none":
            return
        if self._text == "ids":
            sample = dataclasses.replace(sample, prompt=None, expected=None)
        self._append(SAMPLES, [to_json(sample)])

    def on_event(self, event: Event) -> None:
        self._append(EVENTS, [to_json(under_policy(event, self._text, self._update_ids))])
        if event.kind == "checkpoint":
            self.sync()

    def sync(self) -> None:
        """Force every line to the disk.

        It is called before a checkpoint is saved: a run that resumes from it needs the lines of its
        updates.
        """
        self._check()
        for name, file in self._files.items():
            with named(self._folder / name, CURE):
                os.fsync(file)

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _row_line(self, row: RowRecord) -> str:
        if self._text == "full" and self._row_text is not None:
            return json.dumps(
                json.loads(to_json(row)) | {"text": self._row_text(row.row_id)}, ensure_ascii=False
            )
        return to_json(row)

    def _append(self, name: str, lines: Iterable[str]) -> None:
        # backslashreplace: a lone surrogate from a source's JSON becomes the JSON escape that it
        # came from
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
        self._check()
        file = self._files[name]
        size = os.fstat(file).st_size
        with named(self._folder / name, CURE):
            try:
                while data:  # once; again only where the disk took a part, to learn why
                    data = data[os.write(file, data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, size)  # no half line stays behind
                raise


def under_policy(event: Event, text: TextPolicy, row_ids: Iterable[str] = ()) -> Event:
    """The event as record.text allows it to be kept.

    Ids and texts are known by their key in `details` (ID_KEYS, TEXT_KEYS). Under none, ids found
    there and in `row_ids` are also taken out of message and command: an event that names other rows
    than the last update's lists them in `details["row_ids"]`.
    """
    if text == "full":
        return event
    if text == "ids":
        return dataclasses.replace(event, details=_without_keys(event.details, TEXT_KEYS))
    ids = _ids_in(event.details) | set(row_ids)
    return dataclasses.replace(
        event,
        message=_without_ids(event.message, ids),
        command=event.command and _without_ids(event.command, ids),
        details=_without_keys(event.details, TEXT_KEYS | ID_KEYS),
    )


def _attempts(folder: Path, names: tuple[str, ...]) -> dict[int, int]:
    highest: dict[int, int] = {}
    for path in (folder / name for name in names if os.path.lexists(folder / name)):
        for record in read_jsonl(path):
            update, attempt = record.get("update"), record["attempt"]
            if type(update) is not int or type(attempt) is not int:
                raise ValueError(
                    f"{path}: update = {update!r:.80}, attempt = {attempt!r:.80} are not counts; "
                    "the file was damaged or edited. Remove the line"
                )
            highest[update] = max(highest.get(update, 0), attempt)
    return highest


def _without_keys(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):  # a number, such as a count of rows, is no id and no text
        return {
            k: _without_keys(v, keys)
            for k, v in value.items()
            if k not in keys or isinstance(v, int | float)
        }
    if isinstance(value, list | tuple):
        return [_without_keys(item, keys) for item in value]
    return value


def _ids_in(value: Any, key: str = "") -> set[str]:
    if isinstance(value, dict):
        return {row_id for k, v in value.items() for row_id in _ids_in(v, k)}
    if isinstance(value, list | tuple):
        return {row_id for item in value for row_id in _ids_in(item, key)}
    return {value} if isinstance(value, str) and key in ID_KEYS else set()


def _without_ids(text: str, ids: Iterable[str]) -> str:
    for row_id in sorted(ids, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(row_id)}(?!\w)", "(row)", text)
    return text
