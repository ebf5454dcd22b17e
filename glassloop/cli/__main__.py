"""The console command `glassloop`, which hands its words to a command's module.

A command is a module of this package. Its name is the file's name with - for _; the first line of
its docstring is its help line; `main(argv: list[str]) -> int | None` runs it and returns the exit
code, where None is 0.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import io
import os
import pkgutil
import sys
from collections.abc import Sequence

import glassloop
from glassloop import cli
from glassloop.base.card_errors import first_line, lacks_memory
from glassloop.loop.guard import say_once_a_host
from glassloop.record.printable import refusal

USAGE = "usage: glassloop COMMAND [ARGUMENT] ..."
TRAINING = "To train: glassloop train FILE --model ID"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    That is the command's own; 2 for refused input, 1 for a card without memory, with the reason on
    stderr; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"glassloop {glassloop.__version__}")
        return 0
    name, *rest = words
    if isinstance(sys.stdout, io.TextIOWrapper):  # under LC_ALL=C, "ü" is shown as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    if name not in command_names():
        print(_unknown(name), file=sys.stderr)
        return 2
    command = importlib.import_module(_module(name))
    try:
        code = command.main(rest) or 0
        sys.stdout.flush()  # here, where a reader that left can still be excused
        return code
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        # Or the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except (ValueError, OSError) as error:
        if os.environ.get("GLASSLOOP_TRACEBACK"):
            raise
        say_once_a_host(refusal(error))
        return 2
    except RuntimeError as error:
        if not lacks_memory(error) or os.environ.get("GLASSLOOP_TRACEBACK"):
            raise
        said = f"a card has no memory left: {first_line(error)}. See what else runs there "
        said += "(nvidia-smi), or take another with CUDA_VISIBLE_DEVICES"
        print(refusal(said, "ended"), file=sys.stderr)
        return 1


def command_names() -> list[str]:
    """All commands, in alphabetical order."""
    found = (module.name for module in pkgutil.iter_modules(cli.__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def _module(name: str) -> str:
    return f"glassloop.cli.{name.replace('-', '_')}"


def _help() -> str:
    lines = [
        USAGE,
        "",
        inspect.getdoc(glassloop) or "",
        "",
        "Commands (glassloop COMMAND --help says more):",
    ]
    for name in command_names():
        summary = (inspect.getdoc(importlib.import_module(_module(name))) or "").partition("\n")[0]
        lines.append(f"  {name:<10} {summary}")
    return "\n".join([*lines, "", TRAINING])


def _unknown(name: str) -> str:
    """Explain a wrong command's name, and what to type instead."""
    names = command_names()
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}\n{TRAINING}"
    return f"glassloop: {name} is no command. {hint}"


if __name__ == "__main__":
    raise SystemExit(main())
