"""Start a run's ranks from this process, through Accelerate's launcher."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from glassloop.config.arguments import STARTED_BY

LAUNCH_FILE = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: {use_cpu}
gpu_ids: '{gpu_ids}'
num_machines: 1
machine_rank: 0
num_processes: {ranks}
main_process_port: 0
mixed_precision: 'no'
"""


def launch_file(ranks: int, *, on_cpu: bool) -> str:
    """Text of a launch file for `ranks` ranks on this machine.

    It uses torch's elastic launcher.
    """
    ids = ",".join(["-1"] * max(2, ranks)) if on_cpu else "all"  # -1 hides every GPU
    return LAUNCH_FILE.format(use_cpu=str(on_cpu).lower(), gpu_ids=ids, ranks=ranks)


def script() -> Path:
    """train_loop.py, beside the package in a checkout and in site-packages alike."""
    found = importlib.util.find_spec("train_loop")
    if found is None or found.origin is None:
        raise ValueError(
            "train_loop.py is not installed beside glassloop: install the package again (pip "
            "install --force-reinstall glassloop)"
        )
    return Path(found.origin)


def start_ranks(ranks: int, words: Sequence[str], *, on_cpu: bool) -> int:
    """Run train_loop.py with `words` on `ranks` ranks and wait for them.

    The ranks print for themselves, so the launcher's own log stays silent. A signal goes to every
    rank: they save a checkpoint and end.

    Returns:
        The exit code: the first failed rank's, 0 if none failed, 128 + the signal's number after
        one, as shells have it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, cores // ranks) if on_cpu else 1)
    around = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), STARTED_BY: "1"}
    disabled = logging.root.manager.disable
    with tempfile.TemporaryDirectory(prefix="glassloop_train_") as folder:
        file = Path(folder) / "launch.yaml"
        file.write_text(launch_file(ranks, on_cpu=on_cpu), encoding="utf-8")
        options = ["--config_file", str(file), "--log_dir", folder]
        asked = launch_command_parser().parse_args([*options, str(script()), *words])
        logging.disable(logging.CRITICAL)
        try:
            with patch_environment(**around):
                launch_command(asked)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as failed:
            rank, first = failed.get_first_failure()
            return _code(rank, first.exitcode)
        finally:
            logging.disable(disabled)
    return 0


def _code(rank: int, code: int) -> int:
    """Exit code for a failed rank.

    Says so if the rank could not.
    """
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"\nrank {rank} was killed by {name}; its output above says how far it came", flush=True)
    return 1
