"""One peer in a process of its own.

`python benchmarks/peer_arm.py SPEC.json BASE`, or the same under `accelerate launch` for several
ranks.

Its interpreter needs that peer. Of glassloop only parts without dependencies are imported, through
PYTHONPATH.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

REACHED = time.time()

from peer_models import (  # noqa: E402
    PEERS,
    SEED,
    TARGETS,
    Peer,
    check_offloads,
    draw_adapters,
    trainer_class,
    trl_model,
    unsloth_model,
)

from glassloop.bench.clock import Clock  # noqa: E402
from glassloop.bench.machine import card_state  # noqa: E402
from glassloop.bench.results import append  # noqa: E402
from glassloop.bench.spec import Spec, read_spec  # noqa: E402
from glassloop.bench.sums import Tokens, digest_of, energy_of, most, times, turns_of, utilisation  # noqa: E402
from glassloop.bench.workloads import workload  # noqa: E402
from glassloop.disk.cache import cache_root  # noqa: E402
from glassloop.disk.environment import environment  # noqa: E402
from glassloop.predict.shapes import shapes_from_config  # noqa: E402

LR = 2e-4
PEER_PACKAGES = (
    *("trl", "unsloth", "unsloth_zoo", "axolotl"),
    *("liger-kernel", "flash-attn", "xformers"),
)
GIB = 2**30
RANK, LOCAL_RANK = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))


def arm(spec_file: Path, base: Path) -> int:
    """In the peer's process.

    Train, write the line, and leave at once (Unsloth can hang in its own shutdown).
    """
    spec = read_spec(spec_file)
    try:
        line, code = spec.about | measure(spec, PEERS[spec.engine], base, spec_file.parent), 0
    except (
        ValueError,
        RuntimeError,
        OSError,
        ImportError,
        TypeError,
    ) as error:  # a peer's own refusal is a result too
        line, code = spec.about | {"failed": f"{type(error).__name__}: {error}"[:600]}, 3
    if RANK == 0 or "failed" in line:  # the last line counts, so a rank that failed is heard
        append(Path(spec.out), line)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def measure(spec: Spec, peer: Peer, base: Path, signals: Path) -> dict[str, Any]:
    """The peer's own trainer over the workload's rows in their order.

    `signals`: where the arm's turns are told (see bench/clock.py).
    """
    os.environ |= {
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        # Not the working folder.
        "UNSLOTH_COMPILE_LOCATION": str(cache_root(None) / "unsloth_compiled"),
    }
    if peer.library == "unsloth":
        import unsloth  # pyright: ignore[reportMissingImports]  # noqa: F401  (it patches what is imported after it)
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    from glassloop.bench.ceiling import matmul_ceiling

    on_cuda = spec.device == "cuda"
    device = torch.device("cuda", LOCAL_RANK) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    if peer.library == "unsloth":
        model, tokenizer = unsloth_model(peer, spec.r, base, dtype, device)
    else:
        model, tokenizer = trl_model(peer, spec, base, dtype, device)
    draw_adapters(model)
    total = spec.total_updates
    rows = workload(spec.workload, spec.rows_per_update * total, vocabulary=model.config.vocab_size)
    columns = [
        {
            "input_ids": list(row.input_ids),
            "labels": [
                token if labelled else -100
                for token, labelled in zip(row.input_ids, row.supervised, strict=True)
            ],
            "attention_mask": [1] * len(row),
        }
        for row in rows
    ]
    settings: dict[str, Any] = dict(
        output_dir=str(base.parent / "trainer"),
        per_device_train_batch_size=spec.batch,
        gradient_accumulation_steps=spec.rows_per_update // (spec.batch * spec.ranks),
        max_steps=total,
        learning_rate=LR,
        warmup_steps=1,
        weight_decay=0.01,
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        bf16=spec.precision == "bf16",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=SEED,
        max_length=2048,
        packing=False,
        padding_free=peer.padding_free,
        use_liger_kernel=peer.liger,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        use_cpu=not on_cuda,
    )
    if spec.ranks > 1:
        settings |= dict(
            ddp_find_unused_parameters=False, ddp_backend="nccl" if on_cuda else "gloo"
        )
    if peer.library != "unsloth":
        settings |= dict(
            gradient_checkpointing=peer.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )

    def wait() -> None:
        if on_cuda:
            torch.cuda.synchronize()

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if on_cuda else None
    clock = Clock(
        spec,
        signals,
        uuid=uuid,
        first_rank=RANK == 0,
        wait=wait,
        rest=lambda: torch.cuda.empty_cache() if on_cuda else None,
    )
    logged: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.begin(state.global_step + 1)

        def on_step_end(self, args, state, control, **kwargs):
            clock.end(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "grad_norm" in logs:
                logged.append(
                    {"loss_nats": float(logs["loss"]), "grad_norm": float(logs["grad_norm"])}
                )

    arguments: Any = SFTConfig(**settings)
    arguments.layer_offloading = peer.library == "axolotl"
    trainer = trainer_class(peer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    if peer.library == "axolotl":
        check_offloads(trainer)
    # So that the rows of an update are known; under DDP micro-batches go to the ranks in turn.
    in_order = SequentialSampler(columns)
    trainer._get_train_sampler = lambda *_, **__: in_order
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    windows = [
        rows[start : start + spec.rows_per_update]
        for start in range(0, len(rows), spec.rows_per_update)
    ]
    updates = [windows[u - 1] for u in spec.measured_updates]
    measured = [row for window in updates for row in window]
    passes = [measured[start : start + spec.batch] for start in range(0, len(measured), spec.batch)]
    slots = (
        sum(len(row) for row in measured)
        if peer.padding_free
        else sum(len(one) * max(map(len, one)) for one in passes)
    )
    tokens = Tokens(sum(map(len, measured)), sum(row.supervised_tokens for row in measured), slots)
    shapes = shapes_from_config(model.config.to_dict(), spec.model)
    own = dict(
        allocated_gib=torch.cuda.max_memory_allocated() / GIB if on_cuda else None,
        reserved_gib=torch.cuda.max_memory_reserved() / GIB if on_cuda else None,
        host_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        joules=clock.joules,
    )
    ranks = [own]
    if spec.ranks > 1:
        ranks = [own] * spec.ranks
        torch.distributed.all_gather_object(ranks, own)
    after = card_state(uuid) if on_cuda else None
    assert shapes is not None
    flops = utilisation(
        shapes,
        passes,
        packed=peer.padding_free,
        r=spec.r,
        targets=TARGETS,
        checkpointing=spec.checkpointing,
        seconds=clock.measured_s,
        ranks=spec.ranks,
        ceiling=matmul_ceiling(shapes, device) if RANK == 0 else None,
    )
    return {
        "rows_digest": digest_of(rows[: spec.rows_per_update]),
        "updates": len(updates),
        "warmup_s": clock.warmup_update_s,
        "measured_s": clock.measured_s,
        "turns": turns_of(clock.turns_s, [sum(map(len, window)) for window in updates]),
        "tokens_per_s": tokens.per_s(clock.measured_s),
        "tokens_per_s_per_rank": tokens.per_s(clock.measured_s, spec.ranks),
        **times(
            None if spec.turns else spec.launched_at or REACHED,
            clock.started,
            clock.first_ended,
            clock.measured_update_s,
        ),
        "peak": {name: most(rank[name] for rank in ranks) for name in own if name != "joules"},
        "shares": None,
        "energy": energy_of(
            [rank["joules"] for rank in ranks], clock.during, clock.measured_s, tokens.real
        ),
        "update_1": logged[0],
        "losses_nats": [one["loss_nats"] for one in logged],
        "passes": [spec.rows_per_update // (spec.batch * spec.ranks)] * spec.ranks,
        "flops": flops,
        # TRL casts them to bf16.
        "adapters": sorted(
            {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
        ),
        "card": {"before": clock.before, "during": clock.during, "after": after, "p2p": None},
        "machine": {
            **environment(["peers.py"]),
            "threads": torch.get_num_threads(),
            "peer": peer_versions(),
        },
    }


def peer_versions() -> dict[str, str | None]:
    from glassloop.disk.environment import package_version

    return {name: package_version(name) for name in PEER_PACKAGES}


if __name__ == "__main__":
    sys.exit(arm(Path(sys.argv[1]), Path(sys.argv[2])))
