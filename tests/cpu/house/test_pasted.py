"""Commands that glassloop prints can be pasted, whatever folders are called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = "|".join(path.stem for path in (ROOT / "glassloop" / "cli").glob("[a-z]*.py"))
BEFORE_A_NAME = re.compile(rf"(glassloop ({COMMANDS})|--resume|--config|--init_adapter) $")


def unquoted(source: str) -> Iterator[int]:
    """Lines on which a command takes a name that shlex did not quote."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for text, value in zip(node.values, node.values[1:], strict=False):
            if not isinstance(text, ast.Constant) or not isinstance(value, ast.FormattedValue):
                continue
            quoted = ast.unparse(value.value).startswith(("shlex.quote(", "shlex.join("))
            quoted |= (name := ast.unparse(value.value)).isidentifier() and (
                f"{name} = shlex.quote(" in source
            )
            if BEFORE_A_NAME.search(str(text.value)) and not quoted:
                yield value.lineno


def test_names_in_printed_commands_are_quoted() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in [*(ROOT / "glassloop").rglob("*.py"), ROOT / "train_loop.py"]
        if path.name != "arguments.py"  # it names the value of an option, and no command
        for line in unquoted(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "write shlex.quote(str(FOLDER)): a folder's name may have spaces"


def test_an_unquoted_name_is_seen() -> None:
    assert list(unquoted('a\nf"type: glassloop report {folder} --png X"')) == [2]
    assert list(unquoted('f"glassloop report {shlex.quote(str(folder))}"')) == []
    assert list(unquoted('a = shlex.quote(b)\nf"glassloop report {a}"')) == []
