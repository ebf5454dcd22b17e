"""The rows of a run, read, templated and tokenised.

Few rows are tokenised in memory, many once a host into mapped files. Both ways give the same rows,
ids, order, digest and counts. The files lie in the cache (model.cache_dir) under a key of all that
decides them, so another run, and each rank, maps them.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from glassloop.config import Config, DataConfig
from glassloop.data.dataset import Dataset, build_rows
from glassloop.data.identity import key_of
from glassloop.data.making import Order
from glassloop.data.row_file import Opened, open_rows
from glassloop.data.sources import Files, find_files, load_examples
from glassloop.data.templates import make_template
from glassloop.disk.cache import cache_root, published
from glassloop.disk.lock import FolderLock, Held, hold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW_ROWS = 5000  # tokenised in memory sooner than a process starts
FEW_BYTES = 4 * 2**20  # of files with few rows
TEXTS = 1000  # training examples kept beside their rows
POLL_S = 0.5  # between two looks at another process that makes the same rows


class _NotKept(Exception):
    """The cache cannot hold the rows; the message is the reason."""


def read_dataset(
    config: Config, load: Callable[[], PreTrainedTokenizerBase], *, texts: int = 0
) -> Dataset:
    """Read, template and tokenise the rows that config.data asks for.

    Args:
        load: gives the tokenizer; called once the data's files are found.
        texts: training examples that will be looked at; the first ones.

    Raises:
        ValueError: the data cannot train; names field or file, value and cure.
    """
    data, files = config.data, find_files(config.data)
    note = None
    if _many(data, files) and texts <= TEXTS:
        try:
            tokenizer = load()
            opened = _kept(config, tokenizer, files)
            return opened.dataset(make_template(data, tokenizer, opened.manifest.telling))
        except _NotKept as reason:
            note = f"rows are tokenised by every rank, in memory: {reason}"
    loaded = load_examples(data, config.seed, files)
    if note is not None:
        loaded = replace(loaded, notes=(*loaded.notes, note))
    template = make_template(data, load(), (*loaded.train, *loaded.heldout))
    return build_rows(loaded, template, data)


def _many(data: DataConfig, files: Files) -> bool:
    """True if a process of its own is worth its start."""
    paths = [path for found in files.values() for path in found.paths]
    if data.rows is not None and data.rows < FEW_ROWS:
        return False
    return all(path.is_file() for path in paths) and (
        sum(path.stat().st_size for path in paths) >= FEW_BYTES
    )


def _kept(config: Config, tokenizer: PreTrainedTokenizerBase, files: Files) -> Opened:
    """The rows as mapped files, made if they are missing or damaged."""
    if config.model.trust_remote_code:
        raise _NotKept("a tokenizer with code of its own (model.trust_remote_code) stays in a rank")
    try:
        key = key_of(config.data, config.seed, files, tokenizer)
        parent = cache_root(config.model.cache_dir) / "rows"
    except (OSError, ValueError) as error:
        raise _NotKept(str(error)) from error
    folder = parent / key
    opened = _opened(folder, key)
    while opened is None:
        lock = _locked(parent / f"{key}.making")
        try:
            opened = _opened(folder, key)  # another process may have made it meanwhile
            if lock is not None and opened is None:
                _make(config, tokenizer, files, folder, key)
                opened = _opened(folder, key)
                if opened is None:
                    raise _NotKept(f"{folder} cannot be used")
        finally:
            if lock is not None:
                lock.release()
        if opened is None:
            time.sleep(POLL_S)
    return opened


def _opened(folder: Path, key: str) -> Opened | None:
    """The rows in a folder; None if they must be made.

    A folder that does not fit is removed."""
    try:
        return open_rows(folder, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        try:
            folder.unlink() if folder.is_symlink() or folder.is_file() else shutil.rmtree(folder)
        except OSError:
            raise _NotKept(f"{error}, and it cannot be removed") from error
        return None


def _locked(folder: Path) -> FolderLock | None:
    """The right to make rows; None while another process has it."""
    try:
        return hold(folder)
    except Held:
        return None
    except (OSError, ValueError) as error:
        raise _NotKept(str(error)) from error


def _make(
    config: Config, tokenizer: PreTrainedTokenizerBase, files: Files, folder: Path, key: str
) -> None:
    """Make the rows in a process of its own."""
    size = sum(path.stat().st_size for found in files.values() for path in found.paths)
    print(f"tokenising {size / 2**20:,.0f} MiB of rows once; later runs map them", file=sys.stderr)

    def refused(cache: Path, error: OSError) -> _NotKept:
        return _NotKept(f"{cache} cannot be written ({error.strerror})")

    try:
        with published(folder, refused) as temporary:
            ordered(Order(config.data, config.seed, files, tokenizer, temporary, key, TEXTS))
    except OSError as error:
        raise refused(folder.parent, error) from error


def ordered(order: Order) -> None:
    """Make the rows of an order in a process of its own.

    Raises ValueError for data that cannot train and OSError for a disk that refuses.
    """
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # its threads would not survive a fork
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-P", "-m", "glassloop.data.making"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            answer, _ = process.communicate(pickle.dumps(order))
        except BaseException:
            process.kill()
            raise
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    try:
        said = json.loads(answer)
    except ValueError:
        raise RuntimeError(
            f"the process that tokenises rows ended with code {process.returncode}; it says why "
            "above"
        ) from None
    if "refused" in said:
        raise ValueError(said["refused"])
    if "disk" in said:
        raise OSError(errno.EIO, said["disk"])
