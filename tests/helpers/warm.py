"""Python processes that start with the libraries imported.

A fork takes the place of an exec.

An import of torch, transformers and peft costs 5 CPU seconds; a launch of two ranks, 13.
`python warm.py FD` is a server that imports them once and forks for each request (launching.py
asks). The fork gets what an exec would give it: arguments, environment, working directory,
descriptors, session, signals. It imports glassloop anew, ends as Python ends, and is a child of
the process that asked. What it starts with `subprocess` is forked too, so that the genuine
`accelerate launch` starts warm ranks.

A fork differs from a started process in three ways. All forks share the seed of hash(). They see
no CUDA device. Libraries have read the variables of AT_IMPORT already. `Asked.understood` tells
which commands a fork can stand for; the others start as usual.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import random
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
from typing import Any, NoReturn

from warm_asked import Asked

LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "bitsandbytes",
    "accelerate",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "pydantic",
    "yaml",
)
HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1"}  # CUDA does not survive a fork
LENGTH = struct.Struct("!I")
GENUINE = getattr(subprocess, "_fork_exec", None)  # None: off Linux, or another Python's way
HERE = sys.modules[__name__]


# ---- the server


def serve(number: int) -> None:
    """Fork for each request on the socket `number`.

    Ends when its other end closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # a test that trained may have left it ignored
    for name in LIBRARIES:
        importlib.import_module(name)
    place = Place(sys.path[1:], dict(os.environ))
    subprocess._fork_exec = place.fork_exec  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()
    asked = socket.socket(fileno=number)
    asked.sendall(b"!")
    while (request := receive(asked)) is not None:
        message, descriptors = request
        asked.sendall(LENGTH.pack(_adopted(place, message, descriptors)))
        for one in descriptors:
            os.close(one)


def receive(asked: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Read one request and its three descriptors; None at the end."""
    head, descriptors, _, _ = socket.recv_fds(asked, LENGTH.size, 3)
    if not head:
        return None
    size = LENGTH.unpack(head)[0]
    data = b""
    while len(data) < size:
        data += asked.recv(size - len(data))
    return json.loads(data), descriptors


def send(asked: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
    """Write one request and its three descriptors."""
    data = json.dumps(message).encode()
    socket.send_fds(asked, [LENGTH.pack(len(data))], descriptors)
    asked.sendall(data)


def _adopted(place: Place, message: dict[str, Any], descriptors: list[int]) -> int:
    """Fork twice.

    The second one loses its parent, so that whoever asked adopts it.
    """
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        middle = os.getpid()
        pid = os.fork()
        if pid:
            os.write(write, LENGTH.pack(pid))
            os._exit(0)
        while os.getppid() == middle:  # not yet adopted
            time.sleep(0.0005)
        place.become(**message, streams=descriptors, kept=())
    os.close(write)
    pid = LENGTH.unpack(os.read(read, LENGTH.size))[0]
    os.close(read)
    os.waitpid(between, 0)
    return pid


# ---- a fork that becomes a program


class Place:
    """Path and environment of the server, for its forks."""

    def __init__(self, path: list[str], env: dict[str, str]):
        self.path, self.env = path, env

    def fork_exec(self, *given: Any) -> int:
        """Stand in for subprocess._fork_exec: fork this process where that will do."""
        asked = Asked(*given[: len(Asked._fields)])
        if not asked.understood(self.env):
            return GENUINE(*given)
        flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of a fork beside threads
            pid = os.fork()
        if pid == 0:
            self.become(**asked.program(), streams=asked.streams, kept=asked.others)
        return pid

    def become(
        self, *, args: list[str], env: dict[str, str], cwd: str | None, new_session: bool,
        group: int, streams: list[int], kept: tuple[int, ...],
    ) -> NoReturn:  # fmt: skip
        """Be the program from here on, and end with it."""
        code = 255
        try:
            gc.freeze()  # what the parent left is nobody's to collect
            for own, given in enumerate(streams):
                os.dup2(given, own)
            for one in map(int, os.listdir("/proc/self/fd")):
                if one > 2 and one not in kept:
                    with contextlib.suppress(OSError):  # the listing's own
                        os.close(one)
            if new_session:
                os.setsid()
            if group >= 0:
                os.setpgid(0, group)
            if cwd is not None:
                os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            _fresh_signals()
            _fresh_state()
            code = self._run(args[1:])
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            flush()
            os._exit(code)

    def _run(self, words: list[str]) -> int:
        """Run `script`, `-m module` or `-c code` with its arguments.

        Returns the exit code.
        """
        unbuffered = "-u" in words[:1] or bool(os.environ.get("PYTHONUNBUFFERED"))
        words = words[1:] if words[:1] == ["-u"] else words
        for number, name in ((1, "stdout"), (2, "stderr")):
            old = getattr(sys, name)  # it may believe that its descriptor still is a file
            stream = open(number, "w", encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
            stream.reconfigure(
                write_through=unbuffered, line_buffering=name == "stderr" and not unbuffered
            )
            setattr(sys, name, stream)
        asked = os.environ.get("PYTHONPATH")
        asked_paths = asked.split(os.pathsep) if asked else []
        paths = list(dict.fromkeys([*map(os.path.abspath, asked_paths), *self.path]))
        main = types.ModuleType("__main__")
        main.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = main
        code = 0
        try:
            if words[0] == "-m":
                sys.path[:] = [os.getcwd(), *paths]
                sys.argv[:] = ["-m", *words[2:]]
                sys.modules.pop(words[1], None)  # or runpy warns that it is imported
                runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
            elif words[0] == "-c":
                sys.path[:] = ["", *paths]
                sys.argv[:] = ["-c", *words[2:]]
                exec(compile(words[1], "<string>", "exec"), main.__dict__)
            else:
                folder = os.path.dirname(os.path.realpath(words[0]))
                sys.path[:] = [folder, *paths]
                sys.argv[:] = words
                main.__dict__["__file__"] = os.path.abspath(words[0])
                with open(words[0], "rb") as file:
                    program = compile(file.read(), words[0], "exec")
                exec(program, main.__dict__)
        except SystemExit as ended:
            code = _exit_code(ended.code)
        except KeyboardInterrupt:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        return code


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _fresh_signals() -> None:
    """Forget handlers, as an exec does; what is ignored stays ignored."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _fresh_state() -> None:
    """Forget what the parent ran.

    Its modules, clean-ups at exit, random numbers, folders.
    """
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    installed = (sys.prefix, sys.base_prefix)
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if origin and not origin.startswith(installed) and module is not HERE:
            del sys.modules[name]
    sys.path_importer_cache.clear()
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    tempfile.tempdir = None
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def flush() -> None:
    """Write out what Python and C hold back.

    A fork would write it once more.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
