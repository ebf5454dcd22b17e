"""Read YAML that someone else wrote, bounded in size and depth."""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 256 * 1024
MOST_NODES = 100_000  # with every alias written out; a run's config has about 150
MOST_DEPTH = 100


class _Shallow(yaml.SafeLoader):
    """PyYAML's own loader, bounded in depth.

    libyaml's loader ends the process where nesting is deep.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def plain_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    It consists of dicts with text keys, lists, text, numbers, booleans and None.

    Dates and other values that JSON does not have become text.

    Raises:
        ValueError: it is not YAML, names Python objects, contains itself, or is too large.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, {MOST_CHARACTERS:,} at most")
    try:
        loader = _Shallow(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        return _plain(loader.construct_document(node))
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _measure(root: yaml.Node) -> None:
    """Raise ValueError for a value that is too large or endless."""
    known: dict[int, tuple[int, int]] = {}  # by id of a node: its values and depth, aliases inside
    entered: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) not in known:
            if id(node) in entered:
                raise ValueError("an alias in it contains itself")
            entered.add(id(node))
            parts = [measure(part) for part in _parts(node)]
            values = 1 + sum(count for count, _ in parts)
            known[id(node)] = values, 1 + max((depth for _, depth in parts), default=0)
            if values > MOST_NODES:
                raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")
            if known[id(node)][1] > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        return known[id(node)]

    measure(root)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
