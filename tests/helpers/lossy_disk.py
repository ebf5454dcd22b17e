"""A disk that forgets what was not synced.

It watches a folder while code works in it, and lays out what a loss of power may have left. A
folder's names after a crash are those at its last sync, or at any moment since, drawn for each
folder apart. A file's bytes are those at its last sync, those now, or something in between: cut
short, or zeros where bytes were not yet written. A rename is whole or not done. So what nobody
synced may be lost in any combination, and nothing more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Names = dict[str, "Node"]
CALLS = (
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
)  # of os; a look at the folder follows each


@dataclass(eq=False)
class Node:
    """A file or folder.

    `past`: what it held at its last sync, and at each look since.
    """

    folder: bool
    past: list[Any] = field(default_factory=list)  # bytes of a file, Names of a folder


@dataclass(frozen=True)
class Crash:
    """What a power cut at one moment may leave."""

    at: int  # calls before it
    call: str  # the last of them
    root: dict[Node, tuple[Any, ...]]  # past of every node
    top: Node

    def leave(self, target: Path, draw: Callable[[Node, tuple[Any, ...]], Any]) -> None:
        """Lay out, below `target`, what `draw` chooses of each node's past."""
        self._leave(self.top, target, draw)

    def _leave(
        self, node: Node, target: Path, draw: Callable[[Node, tuple[Any, ...]], Any]
    ) -> None:
        past = self.root.get(node, ()) or ({} if node.folder else b"",)
        if node.folder:
            target.mkdir(parents=True, exist_ok=True)
            for name, inner in draw(node, past).items():
                self._leave(inner, target / name, draw)
        else:
            target.write_bytes(draw(node, past))


def nothing_unsynced(node: Node, past: tuple[Any, ...]) -> Any:
    return past[0]


def names_without_bytes(node: Node, past: tuple[Any, ...]) -> Any:
    """Every name with only its synced bytes.

    A rename before a sync leaves this.
    """
    return past[-1] if node.folder else past[0]


def bytes_without_names(node: Node, past: tuple[Any, ...]) -> Any:
    return past[0] if node.folder else past[-1]


def anything(drawn: random.Random) -> Callable[[Node, tuple[Any, ...]], Any]:
    """A mix, with files that are torn."""

    def draw(node: Node, past: tuple[Any, ...]) -> Any:
        if node.folder:
            return drawn.choice(past)
        old, new = past[0], past[-1]
        if old == new:
            return new
        kept = old if new.startswith(old) else b""
        half = kept + new[len(kept) : len(kept) + (len(new) - len(kept)) // 2]
        return drawn.choice([old, new, half, half + bytes(len(new) - len(half))])

    return draw


class LossyDisk:
    """Watch `root`, synced at the start.

    `crashes` has a Crash for the moment after each call.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[
            int, Node
        ] = {}  # by inode; a number that comes back after its file went is another node
        self.crashes: list[Crash] = []
        self.trace: list[tuple[str, str]] = []  # (call, path below root)
        self.top = self._look(root)
        for node in self.known.values():
            del node.past[:-1]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            yield

    def _watched(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            place = self._place(arguments[0], named.get("dir_fd"))
            inside, synced = place is not None and Path(place).is_relative_to(self.root), None
            if inside and place is not None:
                self.look()  # what was written since the last call
                synced = self.known.get(os.fstat(arguments[0]).st_ino) if name == "fsync" else None
            result = genuine(*arguments, **named)
            if inside and place is not None:
                self.look()
                if synced is not None:
                    del synced.past[:-1]
                told = f"{name} {Path(place).relative_to(self.root)}"
                self.trace.append((name, told.partition(" ")[2]))
                self.crashes.append(
                    Crash(len(self.trace), told, {n: tuple(n.past) for n in self._all()}, self.top)
                )
            return result

        return call

    def look(self) -> None:
        """Note what changed."""
        seen: set[int] = set()
        self._look(self.root, seen)
        for gone in self.known.keys() - seen:
            del self.known[gone]

    def _look(self, path: Path, seen: set[int] | None = None) -> Node:
        number = path.lstat().st_ino
        if seen is not None:
            seen.add(number)
        node = self.known.setdefault(number, Node(path.is_dir()))
        now = (
            {inner.name: self._look(inner, seen) for inner in path.iterdir()}
            if node.folder
            else path.read_bytes()
        )
        if not node.past and not node.folder:
            node.past.append(b"")  # a file begins empty
        elif not node.past:
            node.past.append({})
        if node.past[-1] != now:
            node.past.append(now)
        return node

    def _all(self) -> list[Node]:
        """Nodes that any folder's past still names."""
        found: dict[Node, None] = {}
        left = [self.top]
        while left:
            node = left.pop()
            if node not in found:
                found[node] = None
                left += [inner for names in node.past if node.folder for inner in names.values()]
        return list(found)

    @staticmethod
    def _place(place: Any, dir_fd: int | None) -> str | None:
        try:
            path = (
                os.readlink(f"/proc/self/fd/{place}")
                if isinstance(place, int)
                else os.fspath(place)
            )
            above = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        except OSError:
            return None
        return os.path.join(above, path)
