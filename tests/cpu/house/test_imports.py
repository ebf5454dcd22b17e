"""The table of imports, and modules that stay light."""

from __future__ import annotations

import ast
import configparser
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
HEAVY = (
    *("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "triton"),
    *("numpy", "pandas", "wandb"),
)


@dataclass(frozen=True)
class Rule:
    """What a module may import.

    The standard library is free; a package not named here is refused.
    """

    siblings: str = ""  # modules of glassloop
    packages: str = ""  # packages, anywhere in the file
    late: str = ""  # packages, inside functions only


# Data flows one way: a package may only import from rows above its own.
TABLE = {
    "__init__": Rule(),
    "disk": Rule("", "safetensors yaml", late="torch"),
    "config": Rule("disk", "pydantic yaml"),
    "predict": Rule(),
    "stats": Rule(),
    "plan": Rule("config predict"),
    "base": Rule(
        "config disk predict",
        "safetensors torch transformers",
        late="bitsandbytes gguf huggingface_hub tokenizers",
    ),
    "record": Rule("config disk", "rich", late="wandb"),
    "data": Rule(
        "config disk plan",
        "numpy torch",
        late="datasets huggingface_hub pyarrow tokenizers yaml",
    ),
    "report": Rule("disk record stats", "numpy rich"),
    "formula": Rule("data", "torch", late="bitsandbytes"),
    "engines": Rule(
        "base config data disk formula plan predict",
        "numpy peft safetensors torch transformers triton",
    ),
    "health": Rule("config data formula record stats", "torch", late="pynvml"),
    "saved": Rule("config data disk formula plan", "numpy safetensors torch"),
    "loop": Rule(
        "base config data disk engines formula health plan predict record saved",
        "accelerate datasets torch transformers",
    ),
    "doctor": Rule(
        "base config disk engines plan predict record", late="accelerate datasets torch yaml"
    ),
    "use": Rule(
        "base config data disk engines formula loop plan record report saved stats",
        "pydantic rich safetensors torch",
        late="bitsandbytes huggingface_hub peft transformers",
    ),
    "train_loop": Rule("config data formula health loop plan predict report", "torch"),
    "replay": Rule(
        "base config data disk engines formula health loop plan record saved",
        "accelerate torch yaml",
    ),
    "verify": Rule(
        "config data disk formula health loop predict",
        "numpy peft safetensors torch transformers",
        late="bitsandbytes tokenizers",
    ),
    "bench": Rule("config data disk engines formula loop plan predict record verify", "torch"),
    "study": Rule("config disk predict record report stats verify", "rich"),
    "cli": Rule("*", late="*"),
}
NOBODY_IMPORTS = ("cli", "train_loop")  # but cli itself
RUNS_THE_LOOP = ("bench", "replay", "verify")  # these import train_loop: they run its own code
LIGHT = (
    *("config", "config.presets", "config.arguments", "data.rows"),
    *("plan.contract", "plan.engine", "plan.steps", "record.records"),
)
# import name -> name of the package
CALLED = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py"}


@dataclass(frozen=True)
class Import:
    """One imported module.

    Dotted name, whether a function's body holds it, whether only a type checker sees it.
    """

    name: str
    line: int
    late: bool
    types_only: bool


@functools.cache
def sources() -> list[Path]:
    return [*sorted((ROOT / "glassloop").rglob("*.py")), *ROOT.glob("train_loop.py")]


def module_of(path: Path) -> str:
    """Dotted name of a file.

    Glassloop/cli/data.py is glassloop.cli.data, glassloop/__init__.py is glassloop.__init__.
    """
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import statement of a file, relative ones made absolute.

    `from a import b` counts as a.b, for b may be a module.
    """

    def visit(node: ast.AST, late: bool, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, late, types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (
                Import(f"{base}.{alias.name}", node.lineno, late, types_only)
                for alias in node.names
            )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, late, True)
            for child in node.orelse:
                yield from visit(child, late, types_only)
        else:
            inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, types_only)

    yield from visit(ast.parse(source), False, False)


def row_of(module: str) -> str:
    """The table's row for a dotted name.

    Glassloop.engines.fused.norm is fused, train_loop is itself, glassloop alone is __init__.
    """
    parts = module.split(".")
    if parts[0] != "glassloop":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in known_rows() else "__init__"


@functools.cache
def known_rows() -> set[str]:
    """One row for each file or folder of glassloop, and one for train_loop."""
    return {
        "train_loop",
        *(module_of(path).split(".")[1] for path in sources() if path.name != "train_loop.py"),
    }


def violations(module: str, source: str) -> list[str]:
    """What a file imports against the table, one line each."""
    row = row_of(module)
    if row not in TABLE:
        return [f"{module} has no row in TABLE: say what it may import"]
    rule, found = TABLE[row], []
    for item in imports(module, source):
        top = item.name.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        what = f"{module}:{item.line} imports {item.name}"
        if top in ("glassloop", "train_loop"):
            target = row_of(item.name)
            if (
                target in NOBODY_IMPORTS
                and row != "cli"
                and not (target == "train_loop" and row in RUNS_THE_LOOP)
            ):
                found.append(f"{what}: only cli may")
            elif (
                target not in (row, "__init__", "train_loop")
                and rule.siblings != "*"
                and target not in rule.siblings.split()
            ):
                found.append(f"{what}: its row does not name {target}")
        elif item.types_only or top in rule.packages.split():
            continue
        elif rule.late != "*" and top not in rule.late.split():
            found.append(f"{what}: its row does not name {top}")
        elif not item.late:
            found.append(f"{what}: only inside a function")
    return found


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_follow_the_table(path: Path) -> None:
    assert violations(module_of(path), path.read_text(encoding="utf-8")) == []


def test_the_table_flows_one_way_and_names_files_that_exist() -> None:
    above: list[str] = []
    for row, rule in TABLE.items():
        later = set(rule.siblings.split()) - {"*", row} - set(above)
        assert not later, f"{row} may import {later}, which stand below it"
        above.append(row)
    assert set(TABLE) == known_rows()


def test_what_is_imported_is_asked_for() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = parser["options"]["install_requires"] + "".join(
        parser["options.extras_require"].values()
    )
    names = {canonicalize_name(Requirement(line).name) for line in asked.splitlines() if line}
    for path in sources():
        for item in imports(module_of(path), path.read_text(encoding="utf-8")):
            top = item.name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("glassloop", "train_loop"):
                name = canonicalize_name(CALLED.get(top, top))
                assert name in names, (
                    f"{path.name}:{item.line} imports {top}, which setup.cfg does not ask for"
                )


# fmt: off
PLANTED = {  # what -> module, source, complaint
    "package the row lacks": ("glassloop.record.records", "import torch", "does not name torch"),
    "part of such a package": (
        "glassloop.plan.steps", "from torch.nn import functional",
        "does not name torch",
    ),
    "late package on top": (
        "glassloop.formula.optim", "import bitsandbytes",
        "only inside a function",
    ),
    "late package in a class": (
        "glassloop.formula.optim", "class A:\n    import bitsandbytes",
        "only inside a function",
    ),
    "package in a function": (
        "glassloop.record.records", "def f():\n    import torch",
        "does not name torch",
    ),
    "package behind try": (
        "glassloop.plan.steps", "try:\n    import torch\nexcept ImportError:\n    pass",
        "does not name torch",
    ),
    "sibling": (
        "glassloop.formula.loss", "from glassloop.config import Config",
        "does not name config",
    ),
    "sibling from the package": (
        "glassloop.formula.loss", "from glassloop import config",
        "does not name config",
    ),
    "sibling, relative": (
        "glassloop.formula.loss", "from ..config import Config",
        "does not name config",
    ),
    "sibling, relative and bare": (
        "glassloop.formula.loss", "from .. import config",
        "does not name config",
    ),
    "sibling for types": (
        "glassloop.formula.loss",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from glassloop.config import Config",
        "does not name config",
    ),
    "the loop": ("glassloop.engines.peft", "def f():\n    import train_loop", "only cli may"),
    "a command": ("glassloop.plan.steps", "from glassloop.cli import data", "only cli may"),
    "a command, from the loop": ("train_loop", "import glassloop.cli.data", "only cli may"),
    "heavy on top of a command": ("glassloop.cli.data", "import torch", "only inside a function"),
    "a file without a row": ("glassloop.elsewhere", "", "no row in TABLE"),
}
# fmt: on


@pytest.mark.parametrize(("module", "source", "complaint"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_seen(
    module: str, source: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {*TABLE, module.split(".")[-1]}
    monkeypatch.setitem(globals(), "known_rows", lambda: names)
    (found,) = violations(module, source)
    assert complaint in found


ALLOWED = {
    "standard library": ("glassloop.record.records", "import json\nfrom pathlib import Path"),
    "torch for types": (
        "glassloop.data.rows",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ),
    "late package": ("glassloop.formula.optim", "def f():\n    import bitsandbytes as bnb"),
    "the version": ("glassloop.formula.loss", "from glassloop import __version__"),
    "a sibling in the row": ("glassloop.formula.loss", "from glassloop.data.rows import IGNORE"),
    "the loop in a command": (
        "glassloop.cli.data",
        "def main(argv):\n    import torch, train_loop",
    ),
}


@pytest.mark.parametrize(("module", "source"), ALLOWED.values(), ids=ALLOWED)
def test_what_the_table_allows_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def heavy_after(statement: str) -> set[str]:
    """Which of HEAVY a new interpreter holds after the statement."""
    code = f"import sys\n{statement}\nprint('HELD', *(set({HEAVY!r}) & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.rpartition("HELD")[2].split())


def test_what_must_stay_light_loads_nothing_heavy() -> None:
    assert heavy_after("\n".join(f"import glassloop.{name}" for name in LIGHT)) == set()


def test_the_console_command_lists_its_commands_without_torch() -> None:
    assert (
        heavy_after("from glassloop.cli.__main__ import main\nassert main(['--help']) == 0")
        == set()
    )


def test_a_heavy_import_is_seen() -> None:
    assert "torch" in heavy_after("import glassloop.formula.loss")
