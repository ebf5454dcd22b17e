"""Read what wandb wrote to the disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> Iterator[Any]:
    """Read a wandb transaction log.

    It is LevelDB's log format after a header of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Logged values, by metric name, one dict a call."""
    lines = [
        record.history
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in line.item}
        for line in lines
    ]
