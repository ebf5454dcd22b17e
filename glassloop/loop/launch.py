"""The start of a run's processes, and the Accelerator.

What cannot work is refused before anything is loaded.
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from glassloop.config import Config
from glassloop.engines.unsloth_checks import check_unsloth
from glassloop.loop.collectives import record_collectives
from glassloop.loop.commands import launch_command
from glassloop.loop.meeting import meet
from glassloop.loop.watchdog import GROUP_S

MIXED_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
REFUSED_LAUNCHES = {
    DistributedType.DEEPSPEED: "DeepSpeed clips and steps inside its own backward, so neither g "
    "nor "
    "c of the formula could be seen",
    DistributedType.FSDP: "FSDP shards what the flat adapter buffer holds whole (and 4-bit weights "
    "need "
    "bnb_4bit_quant_storage=bf16 with bf16 adapters there); 8B in NF4 fits each 24 GB "
    "card without it",
    DistributedType.MEGATRON_LM: "Megatron-LM brings its own loop",
}
ASKED_BY = {  # what Accelerate reads; it imports the package at once
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_MEGATRON_LM": DistributedType.MEGATRON_LM,
}


def on_cuda() -> bool:
    """True if ranks compute on GPUs.

    There is one, and the launch file does not ask for CPUs.
    """
    return torch.cuda.is_available() and os.environ.get(
        "ACCELERATE_USE_CPU", "false"
    ).lower() not in ("1", "true", "yes")


def hush(rank: int) -> None:
    """Keep libraries from writing between the run's own lines.

    Progress bars without a terminal, and notes that no user can act on.
    """
    if rank != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        # Importing datasets takes a second, and not every run reads through it.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
    # PEFT asks transformers for it.
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )


def check_launch(config: Config) -> None:
    """Raise ValueError for a start that would not do what was asked.

    The message has the command or field that cures it.
    """
    for name, kind in ASKED_BY.items():
        if str(os.environ.get(name)).lower() in ("1", "true", "yes", "y", "on", "t"):
            raise ValueError(
                f"the launch file, or {name}={os.environ[name]} in the environment, asks for "
                f"{kind.value}: {REFUSED_LAUNCHES[kind]}. Use accelerate_configs/ddp_2gpu.yaml, "
                f"and unset {name}"
            )
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    visible = torch.cuda.device_count() if on_cuda() else 0
    words = " ".join(sys.argv[1:])
    if not launched and visible > 1:
        raise ValueError(
            f"{visible} GPUs are visible, but no launcher started this process, so one "
            "would be used. For all of them:\n"
            f"  {launch_command(visible, on_cuda=True)} {words}\nFor one:\n  "
            f"{launch_command(1, on_cuda=True)} {words}"
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch.ranks is not None and config.batch.ranks != ranks:
        raise ValueError(
            f"batch.ranks = {config.batch.ranks}, but {ranks} "
            f"process{'es were' if ranks > 1 else ' was'} started:\n"
            f"  {launch_command(config.batch.ranks, on_cuda=on_cuda())} {words}"
        )
    config.batch.accumulation_for(ranks)
    execution = config.execution
    if execution.engine == "unsloth":
        check_unsloth(on_cuda=on_cuda())
    if not on_cuda():
        if execution.precision == "fp16":
            raise ValueError(
                "execution.precision = fp16 needs a CUDA device: a CPU has no fp16 "
                "training; use fp32 or bf16"
            )
        if config.optimizer.name == "paged_adamw_8bit":
            raise ValueError(
                "optimizer.name = paged_adamw_8bit needs a CUDA device: use adamw_8bit"
            )
        if config.model.attention == "flash_attention_2":
            raise ValueError("model.attention = flash_attention_2 needs a CUDA device: use sdpa")
    elif execution.precision == "bf16" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        raise ValueError(
            f"execution.precision = bf16: {torch.cuda.get_device_name()} has no bf16 "
            "units; use fp16"
        )


def rejoin(backend: str, timeout: timedelta) -> None:
    """Meet under names of this attempt if the launcher restarted the ranks.

    Its store still holds the addresses of the processes that died, and torch gives restarted ranks
    no others (2.13, static rendezvous).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if (
        attempt == "0"
        or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or dist.is_initialized()
    ):
        return
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if on_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    chosen = backend if backend != "auto" else "nccl" if on_cuda() else "gloo"
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=False,
        timeout=timeout,
    )
    own = PrefixStore(f"glassloop/attempt_{attempt}", store)
    dist.init_process_group(chosen, store=own, rank=rank, world_size=ranks, timeout=timeout)


def grow_segments() -> None:
    """Let torch's allocator grow its segments.

    Unless the environment already says how it works.

    Passes differ in length: without it, torch was seen to reserve 47 GiB for an allocation of 21.
        By a call, since setting the variable here
    comes too late for a torch that reads it when it is imported.
    """
    if on_cuda() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def make_accelerator(config: Config) -> Accelerator:
    """Make the Accelerator of this rank.

    Raises ValueError for launch settings that the loop does not support.
    """
    if config.execution.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    grow_segments()
    record_collectives()
    backend = config.execution.backend
    timeout = timedelta(seconds=config.execution.collective_timeout_s + GROUP_S)
    # A lone process has no collectives to carry.
    asked = None if backend == "auto" or "LOCAL_RANK" not in os.environ else backend
    process_group = InitProcessGroupKwargs(backend=asked, timeout=timeout)

    def join() -> Accelerator:
        rejoin(backend, timeout)
        return Accelerator(
            cpu=not on_cuda(),
            mixed_precision=MIXED_PRECISION[config.execution.precision],
            gradient_accumulation_steps=1,  # the loop accumulates itself
            log_with=list(config.tracking.to) or None,
            project_dir=config.run.dir if config.tracking.to else None,
            kwargs_handlers=[
                process_group,
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, find_unused_parameters=False
                ),
            ],
        )

    accelerator = meet(join, config.execution.collective_timeout_s)
    kind = accelerator.distributed_type
    if kind in REFUSED_LAUNCHES:
        raise ValueError(
            f"the launch file asks for {kind.value}: {REFUSED_LAUNCHES[kind]}. "
            "Use accelerate_configs/ddp_2gpu.yaml"
        )
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"the launch file asks for {kind.value}, which glassloop has not been tried "
            "on; use a file of accelerate_configs/"
        )
    return accelerator
