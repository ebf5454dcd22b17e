"""The header: what a run says of itself before it begins."""

from __future__ import annotations

import torch

from glassloop.base.checks import audit_table, dtype_audit
from glassloop.config import Config
from glassloop.data.batches import Batches
from glassloop.data.dataset import Dataset, summary
from glassloop.data.stored import lengths_of
from glassloop.loop.replica import Replica
from glassloop.plan.outlook import early_end, overridden
from glassloop.plan.steps import counted, describe
from glassloop.plan.work import chooses_passes

LOST_IN_BF16 = (
    "note: PEFT adds the adapters' share to products rounded to bf16; "
    "while adapters are small, part of it is lost (docs/findings.md)"
)
EAGER = "attention is eager: the model caps its scores (attn_logit_softcapping), and sdpa cannot"


def header(
    config: Config, batches: Batches, dataset: Dataset, replica: Replica, auto: str
) -> list[str]:
    """Lines on model, rows, the request, its execution, the trained parameters.

    Args:
        auto: the choice of execution.engine = auto, in words; empty if the engine was named.
    """
    execution, lora, report = config.execution, config.lora, replica.plain_engine.report
    model = f"{report.name} {report.commit or ''}".rstrip()
    origin = "read from the cache" if report.from_cache else "loaded"
    asked, windows, updates = describe(batches.plan)
    lossy = execution.engine == "peft" and execution.precision == "bf16"
    eager = replica.plain_engine.attention == "eager" != config.model.attention
    audit = audit_table(dtype_audit(replica.plain_engine.hf))
    return [
        f"model     {model}, {config.model.quantization}, {origin} in {report.seconds:.1f} s",
        *(f"          {note}" for note in report.notes),
        *(f"data      {line}" for line in summary(dataset, config.data)),
        *([f"          {beyond}"] if (beyond := beyond_positions(dataset, replica)) else []),
        f"asked     {asked}",
        f"          {windows}",
        f"          {updates}{overridden(config)}{early_end(config)}",
        *([f"engine    {auto}"] if auto else []),
        f"executed  {execution_of(config, batches, replica.device)}",
        *([f"          {EAGER}"] if eager else []),
        *([f"          {LOST_IN_BF16}"] if lossy else []),
        f"trains    {replica.adapters.trainable:,} parameters: "
        f"W + ({lora.scale_in_words}) B A on {', '.join(lora.targets)}",
        *(f"          {one}" for one in lora.exceptions),
        *([f"          {of_b}"] if (of_b := config.optimizer.b_in_words) else []),
        *(f"          {line}" for line in audit.splitlines()),
    ]


def beyond_positions(dataset: Dataset, replica: Replica) -> str | None:
    """A note on rows longer than the model's positions; None without any."""
    settings = replica.plain_engine.hf.config.get_text_config()
    known = getattr(settings, "max_position_embeddings", None)
    lengths = (*lengths_of(dataset.train.rows), *lengths_of(dataset.heldout.rows))
    over = sum(length > known for length in lengths) if known else 0
    if not over:
        return None
    return (
        f"note: {counted(over, 'row')} of up to {max(lengths):,} tokens, but the model has "
        f"{known:,} positions (max_position_embeddings in its config.json): set "
        f"data.max_tokens={known}, or give it more"
    )


def execution_of(config: Config, batches: Batches, device: torch.device) -> str:
    """Layout, reduction, hardware, engine, precision and activations in words."""
    execution, cuda = config.execution, device.type == "cuda"
    hardware = f"CPU ({counted(torch.get_num_threads(), 'thread')} a rank)"
    if cuda:
        hardware = torch.cuda.get_device_name()
    activations = "recomputed" if execution.checkpointing else "stored"
    return (
        f"{layout_of(config, batches, on_cuda=cuda)}; {execution.reduction} reduction, "
        f"{batches.plan.ranks} x {hardware}; engine {execution.engine}, "
        f"{execution.precision}, activations {activations}"
    )


def layout_of(config: Config, batches: Batches, *, on_cuda: bool) -> str:
    """The layout of an update's rows in words."""
    if batches.layout == "literal":
        return "literal, the micro-batches asked for"
    if batches.layout == "split":
        ranks = counted(batches.plan.ranks, "rank")
        return f"split, passes of at most {batches.pass_tokens:,} tokens over {ranks} together"
    chosen = ""
    if on_cuda and chooses_passes(config):
        chosen = f", chosen under memory.profile={config.memory.profile}"
    return f"packed, the same rows in passes of at most {batches.pass_tokens:,} tokens{chosen}"
