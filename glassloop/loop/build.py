"""From a config to a Run: what is cheap to refuse first, then data, model, optimizer, folder and observers."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed

from glassloop.base.checks import audit_table, dtype_audit
from glassloop.config.arguments import to_yaml
from glassloop.config.config import Config, as_dict
from glassloop.config.sections import ResumeConfig
from glassloop.data.batches import Batches
from glassloop.data.dataset import Dataset, build_rows, summary
from glassloop.data.sources import Loaded, load_examples
from glassloop.data.templates import make_template
from glassloop.disk.environment import environment
from glassloop.disk.publish import make, write_json, write_text
from glassloop.engines.peft import Engine, build_engine, load_tokenizer
from glassloop.formula.dist import (
    all_or_none,
    broadcast_from_rank_0,
    gather_objects,
    in_turn,
    one_first,
    require_same,
)
from glassloop.formula.optim import FlatAdapters, LossScale, make_optimizer
from glassloop.health.inspection import make_inspection
from glassloop.loop.conditions import found_facts, planned_facts, target_shapes
from glassloop.loop.engine_here import engine_here
from glassloop.loop.launch import check_launch, hush, make_accelerator
from glassloop.loop.memory import allocated_gib, choose_pass_tokens, spend_memory
from glassloop.loop.proving import proven
from glassloop.loop.run import Run
from glassloop.loop.signals import CaptureFlag, StopFlag
from glassloop.loop.watchdog import Watchdog
from glassloop.plan.contract import Contract, check_same_rows
from glassloop.plan.engine import in_words, with_engine
from glassloop.plan.outlook import plan_of
from glassloop.plan.steps import describe
from glassloop.plan.work import chooses_passes, pass_tokens_for
from glassloop.record.observers import JsonlObserver
from glassloop.record.terminal import TerminalObserver
from glassloop.record.trackers import TrackerObserver, check_tracking, make_tracker_observer
from glassloop.saved.checkpoint import load_checkpoint, read_state
from glassloop.saved.resuming import (
    after_restart,
    best_heldout,
    changes,
    find_checkpoint,
    position,
    read_plan,
    reshaped,
    sums_of,
    with_past,
)

LOST_IN_BF16 = "note: PEFT adds the adapters' share to products rounded to bf16; while adapters are small, part of it is lost (docs/findings.md)"


def build_run(config: Config) -> Run:
    """Build every part of the run on this rank. Raises ValueError, with the cure, for what cannot be run as asked."""
    config = after_restart(config)
    checkpoint, passed_over = find_checkpoint(config)
    if checkpoint is not None and config.resume.reshape:
        config = reshaped(config, read_state(checkpoint), int(os.environ.get("WORLD_SIZE", "1")))
    check_launch(config)
    check_tracking(config.tracking)
    accelerator = make_accelerator(config)
    stop = StopFlag()
    stop.listen()
    capture = CaptureFlag()
    capture.listen()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    hush(rank)
    device = (
        accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
    )  # Accelerate numbers CPUs; tensors do not

    def read() -> tuple[Any, Loaded]:
        return load_tokenizer(config.model), load_examples(config.data, config.seed)

    first = partial(one_first, accelerator.is_local_main_process)
    old_plan = read_plan(Path(config.resume.run)) if config.resume.run is not None else {}
    asked, choice = config, engine_here(config, checkpoint, old_plan, first)
    config, auto = (
        with_engine(config, choice),
        in_words(config, choice),
    )  # from here on, and on disk, the engine has its name
    tokenizer, loaded = in_turn(first, read, "reading tokenizer and data")
    template = make_template(config.data, tokenizer, (*loaded.train, *loaded.heldout))
    dataset = build_rows(loaded, template, config.data)
    plan = plan_of(config, len(dataset.train.rows), ranks)
    require_same(
        "checkpoints to go on from",
        sums_of(checkpoint),
        "copy the run's folder of one host to the others, or name one with --at",
    )
    done, tracker_ids = position(checkpoint, plan, config.resume.run)
    plan = with_past(plan, old_plan, done)
    batches = Batches(
        rows=dataset.train.rows,
        plan=plan,
        seed=config.seed,
        layout=config.execution.layout,
        pass_tokens=pass_tokens_for(config, None, None),
        two_passes_every=config.record.probe_every_updates,
    )
    rows_digest = hash_of(dataset)
    require_same(
        "training rows",
        rows_digest,
        "the ranks read different data or tokenizers; give every host the same files",
    )

    folder = run_folder(config)
    check_same_rows(old_plan, rows_digest, str(folder / "plan.json"))
    tracker = make_tracker_observer(
        accelerator,
        config.tracking,
        as_dict(config),
        folder,
        folder.name,
        tracker_ids,
        text=config.record.text,
        updates_done=done,
    )  # before the model: a login that does not work shows here
    set_seed(
        config.seed + rank
    )  # dropout differs by rank; adapters and row order have seeds of their own
    engine = build_engine(
        config.model,
        config.lora,
        precision=config.execution.precision,
        checkpointing=config.execution.checkpointing,
        seed=config.seed,
        device=device,
        first=first,
        engine=config.execution.engine,
        longest_row=config.data.max_tokens,
    )
    require_same(
        "base weights",
        engine.report.checksum,
        "the ranks loaded different bases; clear the cache of one, or pin model.revision",
    )
    loaded_gib = allocated_gib(device)
    adapters = FlatAdapters(engine.hf.named_parameters())
    broadcast_from_rank_0(adapters.flat.data)
    pad_id = cast(int, tokenizer.pad_token_id)
    engine, other = proven(asked, engine, adapters, dataset.train.rows, pad_id)
    if other is not None:
        config, auto = with_engine(asked, other), in_words(asked, other)
        if tracker is not None:
            tracker.tell_config(as_dict(config))
    prepared = accelerator.prepare_model(
        engine, device_placement=False, evaluation_mode=config.execution.reduction == "explicit"
    )
    # evaluation_mode: autocast, but no DistributedDataParallel
    model = engine.hf.config.to_dict()  # type: ignore[union-attr, operator]
    batches = replace(batches, pass_tokens=choose_pass_tokens(config, model, device, old_plan))
    shapes = target_shapes(engine.hf, config.lora.targets)
    contract = contract_of(
        batches,
        rows_digest,
        planned_facts(
            config, ranks=plan.ranks, linear_shapes=shapes, on_cuda=device.type == "cuda"
        ),
    )
    shared = contract.facts["devices"] == "shared"
    contract.check_facts(
        found_facts(accelerator, engine, prepared, adapters, device=device, shared=shared)
    )
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        header=(
            *header(config, batches, dataset, engine, adapters, device, auto),
            *(tracker.lines() if tracker else ()),
        ),
        plan=plan,
        contract=contract,
        batches=batches,
        heldout=dataset.heldout.rows,
        heldout_examples=dataset.heldout.examples,
        sample_examples=dataset.train.examples[: config.evaluation.samples],
        engine=prepared,
        plain_engine=engine,
        template=template,
        tokenizer=tokenizer,
        adapters=adapters,
        optimizer=optimizer_of(config, adapters),
        scale=LossScale(
            config.stability.initial_loss_scale,
            config.stability.loss_scale_growth_updates,
            enabled=config.execution.precision == "fp16",
        ),
        rank=rank,
        ranks=ranks,
        device=device,
        pad_id=pad_id,
        stop=stop,
        capture=capture,
        inspection=make_inspection(
            config,
            rows=len(dataset.train.rows),
            rows_per_update=plan.rows_per_update,
            explicit=config.execution.reduction == "explicit" or ranks == 1,
        ),
        first_update=done + 1,
        measured_gib={"load": loaded_gib, "adapters": allocated_gib(device)},
        watchdog=Watchdog(
            folder,
            rank,
            ranks,
            timeout_s=config.execution.collective_timeout_s,
            asked_to_stop=lambda: stop.asked,
        ),
    )
    if config.resume.run is None:
        check_no_run_in(
            folder
        )  # once more: another process may have begun one while this one loaded the model
    if rank == 0:
        observe(run, dataset, tracker)
    run.attempt = gather_objects(run.attempt)[0]
    if checkpoint is not None:
        allowed, told = changes(config, read_state(checkpoint), plan, old_plan)
        run.changes = (*(("warning", note) for note in passed_over), *told)
        with all_or_none("restoring the checkpoint"):
            state = load_checkpoint(
                checkpoint,
                adapters=adapters,
                optimizer=run.optimizer,
                rank=rank,
                world_size=ranks,
                base_hash=engine.report.base_hash,
                config=as_dict(config),
                allow_changed=allowed,
                reshape=config.resume.reshape,
            )
        run.scale.value, run.scale.finite_updates = state.loss_scale, state.finite_updates
        run.inspection.restore(state.details)
        run.batches = replace(run.batches, halvings=state.details.get("halvings", 0))
        run.tiers = state.details.get("tiers")
        run.best_heldout_nats = best_heldout(folder)
        if rank == 0:
            rewrite_plan(run, old_plan)
    if other is not None:
        run.changes = (*run.changes, ("warning", f"{other.why}: the run takes {other.engine}"))
    spend_memory(run)
    return run


def observe(run: Run, dataset: Dataset, tracker: TrackerObserver | None) -> None:
    """Rank 0: write what the run's folder begins with, and start the observers."""
    config, folder = run.config, run.folder
    make(folder)
    if config.resume.run is None:
        assert run.contract is not None
        write_json(folder / "plan.json", run.contract.as_dict())
    started = {
        "launcher_pid": os.getppid(),
        "tracker_ids": tracker.tracker_ids() if tracker else {},
    }
    write_json(folder / "env.json", environment(sys.argv) | started)
    if config.resume.run is None:
        write_text(
            folder / "config.yaml", to_yaml(config)
        )  # last: where it stands, there is a run to go on with
    text = config.record.text
    by_id = {row.row_id: row for row in dataset.train.rows}
    jsonl = JsonlObserver(
        folder,
        text,
        row_text=lambda row_id: str(run.tokenizer.decode(list(by_id[row_id].input_ids))),
    )
    coming = range(run.first_update, run.plan.updates + 1)
    again = [
        jsonl.evaluation_attempt(u) for u in ([0] if run.first_update == 1 else []) + list(coming)
    ]
    run.attempt = max(*again, *(jsonl.attempt(u) for u in coming))
    run.sync_records = jsonl.sync
    run.observers = [jsonl, TerminalObserver(run.plan.updates, run.ranks, text=text)]
    if tracker is not None:
        run.observers.append(tracker)
        run.tracker_ids = tracker.tracker_ids


def rewrite_plan(run: Run, old: dict[str, Any]) -> None:
    """Where a run goes on otherwise than planned, write plan.json and config.yaml anew; the old ones stay as plan_000020.json, config_000020.yaml."""
    assert run.contract is not None
    new = run.contract.as_dict()
    if all(
        old.get(name) == (list(new[name]) if name == "lr" else new[name])
        for name in ("updates", "ranks", "size", "accumulation", "lr")
    ):
        return
    for name in ("plan.json", "config.yaml"):
        if (path := run.folder / name).exists():
            write_text(
                path.with_stem(f"{path.stem}_{run.first_update - 1:06d}"),
                path.read_text(encoding="utf-8"),
            )
    write_json(run.folder / "plan.json", new)
    write_text(
        run.folder / "config.yaml",
        to_yaml(run.config.model_copy(update={"resume": ResumeConfig()})),
    )


def optimizer_of(config: Config, adapters: FlatAdapters) -> torch.optim.Optimizer:
    """The configured optimizer over the flat buffer."""
    asked = config.optimizer
    return make_optimizer(
        asked.name,
        adapters.flat,
        lr=asked.lr,
        beta1=asked.beta1,
        beta2=asked.beta2,
        eps=asked.eps,
        weight_decay=asked.weight_decay,
    )


def contract_of(batches: Batches, rows_digest: str, facts: dict[str, Any]) -> Contract:
    """What the run is held to, update by update."""
    rows, supervised, real = [], [], []
    for update in range(1, batches.plan.updates + 1):
        window = batches.window(update)
        rows.append(len(window.rows))
        supervised.append(batches.supervised_tokens(window))
        real.append(sum(len(batches.rows[row]) for row in window.rows))
    pass_tokens = batches.pass_tokens if batches.layout == "packed" else None
    return Contract(
        batches.plan, tuple(rows), tuple(supervised), tuple(real), rows_digest, facts, pass_tokens
    )


def run_folder(config: Config) -> Path:
    """The run's folder, the same on every rank. Raises ValueError where a new run would write into an old one's."""
    if config.resume.run is not None:
        return Path(config.resume.run)
    name = (
        config.run.name
        or f"{config.preset or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    )
    folder = Path(config.run.dir) / gather_objects(name)[0]
    check_no_run_in(folder)
    return folder


def check_no_run_in(folder: Path) -> None:
    """Raise ValueError, on all ranks, where a run has begun in `folder`."""
    if any(gather_objects((folder / "config.yaml").exists())):
        raise ValueError(
            f"run.name = {folder.name}: {folder} already holds a run; choose another name, or go on with it: --resume {folder}"
        )


def hash_of(dataset: Dataset) -> str:
    """16 hex digits that differ where ids, tokens or labels of any training or held-out row differ."""
    digest = hashlib.sha256()
    for row in (*dataset.train.rows, *dataset.heldout.rows):
        digest.update(
            row.row_id.encode() + array("i", row.input_ids).tobytes() + bytes(row.supervised)
        )
    return digest.hexdigest()[:16]


def header(
    config: Config,
    batches: Batches,
    dataset: Dataset,
    engine: Engine,
    adapters: FlatAdapters,
    device: torch.device,
    auto: str,
) -> list[str]:
    """What a run says of itself before it begins: rows, what was asked, how it is executed, what is trained. auto: the engine's choice, in words."""
    execution = config.execution
    report = engine.report
    hardware = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU ({torch.get_num_threads()} threads a rank)"
    )
    overrides = (
        f" (schedule.updates overrides epochs = {config.schedule.epochs:g})"
        if config.schedule.updates is not None
        else ""
    )
    asked, windows, updates = describe(batches.plan)
    layout = layout_of(config, batches, on_cuda=device.type == "cuda")
    checkpointing = "recomputed" if execution.checkpointing else "stored"
    origin = "read from the cache" if report.from_cache else "loaded"
    return [
        f"model     {report.name} {report.commit or ''}".rstrip()
        + f", {config.model.quantization}, {origin} in {report.seconds:.1f} s",
        *(f"          {note}" for note in report.notes),
        *(f"data      {line}" for line in summary(dataset, config.data)),
        f"asked     {asked}",
        f"          {windows}",
        f"          {updates}{overrides}",
        *([f"engine    {auto}"] if auto else []),
        f"executed  {layout}; {execution.reduction} reduction, {batches.plan.ranks} x {hardware}; engine {execution.engine}, "
        f"{execution.precision}, activations {checkpointing}",
        *(
            [f"          {LOST_IN_BF16}"]
            if execution.engine == "peft" and execution.precision == "bf16"
            else []
        ),
        f"trains    {adapters.trainable:,} parameters: W + ({config.lora.alpha:g}/{config.lora.r}) B A on {', '.join(config.lora.targets)}",
        *(f"          {line}" for line in audit_table(dtype_audit(engine.hf)).splitlines()),
    ]


def layout_of(config: Config, batches: Batches, *, on_cuda: bool) -> str:
    """How an update's rows are laid out, in words."""
    if batches.layout == "literal":
        return "literal, the micro-batches asked for"
    chosen = (
        f", chosen under memory.profile={config.memory.profile}"
        if on_cuda and chooses_passes(config)
        else ""
    )
    return f"packed, the same rows in passes of at most {batches.pass_tokens:,} tokens{chosen}"
