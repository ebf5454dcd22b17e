"""From a config to a Run, in five stages.

Start, rows, replica, folder and observers, resume. What is cheap to refuse comes first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from glassloop.config import Config, as_dict
from glassloop.data.batches import Batches
from glassloop.formula.dist import all_or_none, gather_objects, require_same
from glassloop.health.inspection import make_inspection
from glassloop.health.patience import HeldOut, heldout_from
from glassloop.loop.claim import release
from glassloop.loop.conditions import (
    contract_of,
    found_facts,
    planned_facts,
    target_shapes,
)
from glassloop.loop.folder import check_no_run_in, observe
from glassloop.loop.header import header
from glassloop.loop.launch_clock import LaunchClock, LaunchObserver
from glassloop.loop.machine_here import sampler_of
from glassloop.loop.memory import allocated_gib, check_gib, choose_pass_tokens
from glassloop.loop.proving import proven
from glassloop.loop.replica import Replica, adapters_of, build_replica, device_of, load_engine
from glassloop.loop.run import Run
from glassloop.loop.signals import StopFlag
from glassloop.loop.spending import make_lean, spend_memory
from glassloop.loop.starting import Rows, Start, read_rows, settle, start_ranks
from glassloop.loop.watchdog import Watchdog
from glassloop.loop.witness import Witness
from glassloop.plan.contract import Contract, check_same_rows
from glassloop.plan.engine import in_words, with_engine
from glassloop.record.trackers import make_tracker_observer
from glassloop.saved.changes import Notice, changes
from glassloop.saved.checkpoint import load_checkpoint
from glassloop.saved.resuming import (
    best_heldout,
    check_same_beginning,
)
from glassloop.saved.run_state import RunState


def build_run(config: Config, stop: StopFlag | None = None) -> Run:
    """Build the run on this rank.

    Raises ValueError, with the cure, for what cannot run as asked.

    Args:
        stop: set up by a Guard; None: a new one that handles signals until the run is closed.
    """
    clock = LaunchClock()
    clock.ends("imports")
    start = start_ranks(config, stop)
    clock.ends("ranks")
    try:
        return build_in_folder(start, clock)
    except BaseException:
        release(start.lock)
        raise


def build_in_folder(start: Start, clock: LaunchClock) -> Run:
    """Build the run in its folder, which is locked."""
    rows = read_rows(start)
    start = settle(start, rows)
    config, accelerator, folder = start.config, start.accelerator, start.folder
    check_same_rows(start.past.plan, rows.dataset.digest, str(folder / "plan.json"))
    tracker = make_tracker_observer(  # before the model: a login that does not work shows here
        accelerator,
        config.tracking,
        as_dict(config),
        folder,
        folder.name,
        rows.tracker_ids,
        text=config.record.text,
        updates_done=rows.updates_done,
    )
    clock.ends("data")
    start, replica, measured_gib = load_replica(start, rows, clock)
    clock.ends("proof")
    if tracker is not None and start.config != config:
        tracker.tell_config(as_dict(start.config))
    run = assemble(start, rows, replica, folder, measured_gib)
    if tracker is not None:
        run.header = (*run.header, *tracker.lines())
    if config.resume.run is None:
        check_no_run_in(folder)  # again: one may have ended there before this one had the lock
    if start.past.saved is not None:
        resume(run, start, start.past.saved)
    if replica.rank == 0:
        observe(run, rows.dataset, tracker, start.past.recorded, start.past.plan)
        run.observers.append(LaunchObserver(clock, run.event))
    run.attempt = gather_objects(run.attempt)[0]
    spend_memory(run)
    return run


def load_replica(
    start: Start, rows: Rows, clock: LaunchClock
) -> tuple[Start, Replica, dict[str, float]]:
    """Load the base and build this rank's replica.

    Returns the start, with another engine if fused is not sound, the replica, and measured GPU
    memory by phase, in GiB.
    """
    config, accelerator = start.config, start.accelerator
    device, rank = device_of(accelerator), accelerator.process_index
    pad_id = cast(int, rows.tokenizer.pad_token_id)
    engine = load_engine(config, device, rank=rank, first=start.first, source=start.source)
    cure = "the ranks loaded different bases; clear the cache of one, or pin model.revision"
    require_same("base weights", engine.report.checksum, cure)
    loaded_gib = allocated_gib(device)
    clock.ends("base")
    make_lean(engine, config.memory)
    adapters = adapters_of(engine)
    measured_gib = {"load": loaded_gib, "adapters": allocated_gib(device)}
    engine, other = proven(start.asked, engine, adapters, rows.batches.rows, pad_id)
    if other is not None:
        start = replace(
            start,
            config=with_engine(start.asked, other),
            auto=in_words(start.asked, other),
            warnings=(*start.warnings, f"{other.why}: the run takes {other.engine}"),
        )
    replica = build_replica(
        start.config,
        accelerator,
        engine,
        adapters,
        device=device,
        rank=rank,
        ranks=accelerator.num_processes,
        pad_id=pad_id,
    )
    return start, replica, measured_gib | check_gib(device)


def planned_and_found(start: Start, rows: Rows, replica: Replica) -> tuple[Batches, Contract]:
    """Compare the plan with what was built; return passes and contract.

    Raises ContractBroken if this is not the run that was planned.
    """
    config, device, hf = start.config, replica.device, replica.plain_engine.hf
    tokens = choose_pass_tokens(config, hf.config.to_dict(), device, start.past.plan)
    batches = replace(rows.batches, pass_tokens=tokens)
    planned = planned_facts(
        config,
        ranks=batches.plan.ranks,
        linear_shapes=target_shapes(hf, config.lora),
        base=hf.config,
        on_cuda=device.type == "cuda",
    )
    contract = contract_of(batches, rows.dataset.digest, planned, config.evaluation)
    shared = planned["devices"] == "shared"
    contract.check_facts(found_facts(start.accelerator, replica, shared=shared))
    return batches, contract


def assemble(
    start: Start, rows: Rows, replica: Replica, folder: Path, measured_gib: dict[str, float]
) -> Run:
    """Put the run together."""
    config, dataset, stop = start.config, rows.dataset, start.stop
    batches, contract = planned_and_found(start, rows, replica)
    per_update, trained = batches.plan.rows_per_update, len(dataset.train.rows)
    sampler, unread = sampler_of(config, replica)
    return Run(
        config=config,
        accelerator=start.accelerator,
        folder=folder,
        header=(*header(config, batches, dataset, replica, start.auto), *unread),
        plan=batches.plan,
        contract=contract,
        batches=batches,
        heldout=dataset.heldout.rows,
        heldout_examples=dataset.heldout.examples,
        sample_examples=tuple(dataset.train.examples[: config.evaluation.samples]),
        template=rows.dataset.template,
        tokenizer=rows.tokenizer,
        replica=replica,
        lock=start.lock,
        stop=stop,
        capture=start.capture,
        changes=tuple(Notice("warning", warning) for warning in start.warnings),
        inspection=make_inspection(config, rows=trained, rows_per_update=per_update),
        first_update=rows.updates_done + 1,
        measured_gib=measured_gib,
        machine=sampler,
        witness=Witness(folder, replica.rank, replica.device),
        watchdog=Watchdog(
            folder,
            replica.rank,
            replica.ranks,
            timeout_s=config.execution.collective_timeout_s,
            asked_to_stop=lambda: stop.asked,
        ),
    )


def resume(run: Run, start: Start, saved: RunState) -> None:
    """Restore the checkpoint, on all ranks or none.

    Notes how the run differs from it.
    """
    config, replica = run.config, run.replica
    allowed, notices = changes(config, saved, run.plan, start.past.plan)
    run.changes = (*run.changes, *notices)
    if start.past.checkpoint is None:
        check_same_beginning(saved, config, replica.ranks, allowed)
        return
    with all_or_none("restoring the checkpoint"):
        state = load_checkpoint(
            start.past.checkpoint,
            adapters=replica.adapters,
            optimizer=replica.optimizer,
            rank=replica.rank,
            world_size=replica.ranks,
            base_hash=replica.plain_engine.report.base_hash,
            config=as_dict(config),
            allow_changed=allowed,
            reshape=config.resume.reshape,
        )
    replica.scale.value, replica.scale.finite_updates = state.loss_scale, state.finite_updates
    run.inspection.restore(state.details)
    run.batches = replace(run.batches, halvings=state.details.get("halvings", 0))
    run.tiers = state.details.get("tiers")
    run.best_heldout_nats = best_heldout(run.folder)
    older = HeldOut(update=state.update)  # a checkpoint that does not have it
    known = state.details.get("heldout")
    run.course = older if known is None else heldout_from(known)
