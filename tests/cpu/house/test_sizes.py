"""How long files, functions, signatures and first lines of docstrings may get."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILE_LINES = 350
FUNCTION_LINES = 80
OF_THE_LOOP = {"update_once": 45, "train": 150}  # lines of these functions of train_loop.py
PARAMETERS = 12
FIRST_LINE_WORDS, MEDIAN_WORDS = 12, 10
WITH_BODY = ast.FunctionDef | ast.AsyncFunctionDef


class Found(NamedTuple):
    where: str  # file:line name
    size: int


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted([*found, ROOT / "train_loop.py"])


def nodes(paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    """(file:line name, node) of every module, class and function."""
    for path in paths:
        name = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module):
                yield f"{name}:1", node
            elif isinstance(node, ast.ClassDef | WITH_BODY):
                yield f"{name}:{node.lineno} {node.name}", node


def functions(paths: list[Path]) -> list[Found]:
    """Lines of every function, from def to the last one."""
    return [
        Found(where, (node.end_lineno or 0) - node.lineno + 1)
        for where, node in nodes(paths)
        if isinstance(node, WITH_BODY)
    ]


def is_kernel(node: ast.AST) -> bool:
    """A Triton function: it has no structures, so each stride is a parameter."""
    return isinstance(node, WITH_BODY) and any(
        "jit" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def parameters(paths: list[Path]) -> list[Found]:
    """Parameters of every function but Triton's, without self."""
    found = []
    for where, node in nodes(paths):
        if isinstance(node, WITH_BODY) and not is_kernel(node):
            given = node.args
            names = [one.arg for one in given.posonlyargs + given.args + given.kwonlyargs]
            names += [one.arg for one in (given.vararg, given.kwarg) if one is not None]
            found.append(Found(where, len([name for name in names if name not in ("self", "cls")])))
    return found


def first_lines(paths: list[Path]) -> list[Found]:
    """Words of the first paragraph of every docstring."""
    return [
        Found(where, len(said.partition("\n\n")[0].split()))
        for where, node in nodes(paths)
        if isinstance(node, ast.Module | ast.ClassDef | WITH_BODY)
        and (said := ast.get_docstring(node)) is not None
    ]


def above(found: list[Found], most: int) -> list[str]:
    return [f"{where}: {size}" for where, size in found if size > most]


OURS = files("glassloop", "tests/helpers")


def test_no_file_outgrows_a_reader() -> None:
    sizes = [
        Found(str(path.relative_to(ROOT)), len(path.read_text(encoding="utf-8").splitlines()))
        for path in files("glassloop", "tests", "benchmarks")
    ]
    assert len(sizes) > 500
    assert above(sizes, FILE_LINES - 1) == [], "split it by concept"


def test_no_function_outgrows_a_screen_or_two() -> None:
    sizes = functions(OURS)
    others = [one for one in sizes if one.where.split()[-1] not in OF_THE_LOOP]
    assert above(others, FUNCTION_LINES) == [], "split it"


@pytest.mark.parametrize(("name", "most"), OF_THE_LOOP.items())
def test_the_loop_stays_readable(name: str, most: int) -> None:
    loop = functions([ROOT / "train_loop.py"])
    assert [one.size for one in loop if one.where.endswith(f" {name}")] != []
    assert above([one for one in loop if one.where.endswith(f" {name}")], most) == []


def test_no_function_has_more_parameters_than_a_caller_can_read() -> None:
    assert above(parameters(OURS), PARAMETERS) == [], "put what belongs together into a dataclass"


def test_docstrings_begin_with_one_short_line() -> None:
    sizes = first_lines(OURS)
    assert above(sizes, FIRST_LINE_WORDS) == [], "one verb or noun phrase; the rest below it"
    assert statistics.median(one.size for one in sizes) <= MEDIAN_WORDS


def test_what_is_too_long_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    body = "        pass\n" * 79
    source = f'''
class Holds:
    def long(self, a, /, b, *c, d=1, **e):
        """{"word " * 13}"""
{body}
@triton.jit
def kernel(a, b, c, d, e, f): pass
async def waits():
    """Short.

    {"And more. " * 20}"""
'''
    path = tmp_path / "planted.py"
    path.write_text(source, encoding="utf-8")
    assert above(functions([path]), FUNCTION_LINES) == ["planted.py:3 long: 81"]
    assert above(parameters([path]), 4) == ["planted.py:3 long: 5"]
    assert above(first_lines([path]), FIRST_LINE_WORDS) == ["planted.py:3 long: 13"]
