"""The training loop. Everything in it follows one formula, line by line:

    N  = sum over ranks and rows of the update's supervised tokens
    g  = sum over ranks and rows of grad(loss_sum) / N            loss_sum: summed token cross-entropy, fp32
    c  = min(1, max_norm / |g|)
    theta <- AdamW8bit(theta, c * g, lr(u))                        u = 1 .. U

`update_once` is the formula and `train` the run around it; `glassloop/loop/run.py` builds what they need. Start it with

    accelerate launch --config_file accelerate_configs/ddp_2gpu.yaml train_loop.py PRESET
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from glassloop.config.arguments import parse
from glassloop.data.batches import Window, build_pass, empty_pass
from glassloop.formula.dist import (
    Gate,
    broadcast_from_rank_0,
    gather_reports,
    leave,
    reduce_gradients,
)
from glassloop.formula.optim import l2_norm
from glassloop.health.decision import Outcome, Terms, clip_coefficient, describe
from glassloop.health.inspection import look_before_step, probe_of
from glassloop.loop.build import build_run
from glassloop.loop.memory import cures, preflight_done, smaller_passes
from glassloop.loop.run import ReplicasDiffer, Run
from glassloop.loop.watchdog import WAITS
from glassloop.plan.contract import ContractBroken
from glassloop.report.writing import report_at_the_end


def update_once(run: Run, u: int) -> Outcome | None:
    """Carry out update u and say what it did. None: a stop was asked in its middle, it was given up and has changed nothing.

    Raises, on every rank alike, RanOutOfMemory, ContractBroken or ReplicasDiffer; nothing was applied then.
    """
    started = time.perf_counter()
    run.remember(u)  # random numbers and the like, as they are before the update
    lr = run.optimizer.param_groups[0]["lr"] = run.plan.lr[u - 1]  # lr(u)
    window = run.batches.window(u)
    n = 0 if u in run.inspection.left_out else run.batches.supervised_tokens(window)  # N
    run.adapters.zero_grad()
    sums = run_passes(run, window, n)  # backward of loss_sum / N, pass by pass
    gate = open_gate(run, window, sums)  # every rank's report, on every rank
    computed = time.perf_counter()
    if not gate.whole:
        return None
    check_contract(run, u, n, gate)  # rows, tokens and lr are the planned ones
    if run.ddp:
        run.adapters.check_views()
        run.adapters.grad.mul_(run.ranks)  # DDP has reduced by now, to the mean
    else:
        reduce_gradients(run.adapters.grad)  # SUM over ranks
    scale = run.scale.value  # fp16's loss scale, else 1: `grad` is g * scale from here
    norm = broadcast_from_rank_0(l2_norm(run.adapters.grad)).item() / scale  # |g|, rank 0's
    reduced = time.perf_counter()

    run.does(u, "steps")
    terms = Terms(lr, n, norm, scale)
    decision = run.inspection.decide(run.batches, window, gate, run.adapters, terms)
    look = look_before_step(run, window, gate, decision, terms)  # probe and capsule: read only
    clip = clip_coefficient(norm, decision.max_norm)  # c
    if decision.reason is None:
        if clip != scale:
            run.adapters.grad.mul_(clip / scale)  # c * g
        run.optimizer.step()  # theta
    run.scale.after(finite=math.isfinite(norm))
    times = (started, computed, reduced, time.perf_counter() - look.seconds)
    probe = probe_of(run, u, look.before, applied=decision.reason is None)
    known = dict(clip=clip, times=times, noise=look.noise, probe=probe)
    return describe(run.batches, window, gate, decision, terms, **known, **run.constants())


@dataclass(frozen=True)
class PassSums:
    """What one rank's passes added up to; tensors stay on the device until the gate reads them."""

    loss_sum: Tensor  # () fp32, nats
    row_loss_sums: Tensor  # (R,) fp32, nats
    passes: int
    rows: int
    supervised_tokens: int
    real_tokens: int
    slot_tokens: int
    passes_s: float
    whole: bool
    out_of_memory: bool


def run_passes(run: Run, window: Window, n: int) -> PassSums:
    """Forward and backward of this rank's passes: afterwards the flat gradient holds its share of g, times fp16's loss scale.

    Stops early, and says so, where a stop was asked or memory ran out: then nobody reduces or applies anything.
    """
    started = time.perf_counter()
    passes = window.passes[run.rank] if n else ()
    losses = [torch.zeros((), device=run.device)]
    row_losses = [torch.zeros(0, device=run.device)]
    done = counted = supervised = real = slots = 0
    out_of_memory = False
    half_way = run.inspection.half_way(window)
    try:
        for index, rows in enumerate(passes):
            if run.stop.asked and not run.ddp:  # under DDP the others already wait inside backward
                break
            run.does(window.update, f"computes pass {index + 1} of {len(passes)}")
            last = index == len(passes) - 1
            with nullcontext() if last or not run.ddp else run.engine.no_sync():
                p = build_pass(
                    [run.batches.rows[row] for row in rows],
                    packed=window.packed,
                    pad_id=run.pad_id,
                    device=run.device,
                )
                loss_sum, row_loss_sums = run.engine(p)
                (loss_sum * (run.scale.value / n)).backward()
            losses.append(loss_sum.detach())
            row_losses.append(row_loss_sums)
            done, counted, supervised = (
                done + 1,
                counted + len(p.row_ids),
                supervised + p.supervised_tokens,
            )
            real, slots = real + p.real_tokens, slots + p.slot_tokens
            if index == half_way:
                run.inspection.half = (run.adapters.grad.clone(), supervised)
        if run.ddp and n and not passes:
            loss_sum, _ = run.engine(
                empty_pass(run.batches.rows[0], pad_id=run.pad_id, device=run.device)
            )
            loss_sum.backward()  # 0, so that the other ranks' reduction finds a partner
    except torch.OutOfMemoryError:
        out_of_memory = True
    if run.device.type == "cuda":
        torch.cuda.synchronize(
            run.device
        )  # the gate would wait for it anyway: the rank's own time ends here
    whole = done == len(passes) and not out_of_memory
    counts = (done, counted, supervised, real, slots, time.perf_counter() - started)
    return PassSums(
        torch.stack(losses).sum(),
        torch.cat(row_losses),
        *counts,
        whole=whole,
        out_of_memory=out_of_memory,
    )


class RanOutOfMemory(RuntimeError):
    """Raised on every rank when one has run out of memory; the update has changed nothing."""


def open_gate(run: Run, window: Window, sums: PassSums) -> Gate:
    """Exchange the ranks' reports. Raises RuntimeError, on all ranks, for what must end the run before anything is reduced."""
    run.does(window.update, WAITS)
    gate = gather_reports(
        **vars(sums),
        stop=run.stop.asked,
        capture=run.capture.take(),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else 0.0,
        grad_norm=l2_norm(run.adapters.grad),
        checksum=run.adapters.checksum(run.optimizer),
        largest_weight=torch.linalg.vector_norm(run.adapters.flat.detach(), ord=math.inf),
        rows_of_ranks=[len(run.batches.share(window, rank)) for rank in range(run.ranks)],
    )
    if gate.out_of_memory:
        raise RanOutOfMemory(
            f"rank {', '.join(map(str, gate.out_of_memory))} ran out of memory in update {window.update}; nothing was applied. "
            f"Smaller passes with the same rows an update: {cures(run)}"
        )
    if not gate.replicas_agree:
        raise ReplicasDiffer(run.disagreement(f"before update {window.update}"))
    return gate


def check_contract(run: Run, u: int, n: int, gate: Gate) -> None:
    """Raise ContractBroken, on all ranks, unless the passes had the rows and tokens that plan.json has for update u, and lr is its lr."""
    if n and run.contract is not None:
        names = ("rows", "supervised_tokens", "real_tokens")
        counted = {name: sum(getattr(report, name) for report in gate.reports) for name in names}
        run.contract.check_update(u, **counted, lr=run.optimizer.param_groups[0]["lr"])


def preflight(run: Run) -> None:
    """Forward and backward of each rank's heaviest pass, no step. Raises ValueError, on all ranks, where it does not fit or is not finite."""
    run.remember(run.first_update - 1)
    while True:
        window = run.batches.heaviest()
        run.adapters.zero_grad()
        try:
            gate = open_gate(
                run, window, run_passes(run, window, max(1, run.batches.supervised_tokens(window)))
            )
            break
        except RanOutOfMemory as error:
            if not smaller_passes(run, 0, str(error)):
                raise ValueError(f"preflight, before update 1: {error}") from None
    run.adapters.zero_grad()
    run.put_back()
    preflight_done(run, window, gate)


def train(run: Run) -> int:
    """Carry out the run's updates, with evaluations, samples and checkpoints when due. Returns the exit code: 0 whole or stopped on demand."""
    run.begin()
    if run.config.execution.preflight:
        try:
            preflight(run)
        except ValueError as error:
            return run.refused(str(error))
    run.start()
    u, skipped = run.first_update, 0
    while u <= run.plan.updates:
        try:
            outcome = update_once(run, u)
        except RanOutOfMemory as error:
            run.put_back()
            if smaller_passes(run, u, str(error)):
                continue  # the same rows once more
            return run.failed(u, str(error), run.resume_command)
        if outcome is None:
            run.put_back()
            return run.stopped(u - 1, "a stop was asked; the update under way was given up")
        run.tell(outcome)
        decision = outcome.decision
        skipped = skipped + 1 if decision.bad and decision.reason else 0
        if decision.ends or skipped > run.config.stability.max_skipped:
            run.put_back()
            return run.failed(u, decision.reason, f"{run.resume_command} --without-window {u}")
        if outcome.stop:
            return run.stopped(u, "a stop was asked")
        if run.evaluation_is_due(u):
            run.evaluate(u)
        if run.checkpoint_is_due(u):
            run.save(u)
        u += 1
    return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Command line to exit code: 0 done or stopped on demand, 1 ended by a failure, 2 refused before it began."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        run = build_run(config)
    except (ValueError, OSError, ContractBroken) as error:
        if os.environ.get("GLASSLOOP_TRACEBACK"):
            raise
        if (
            os.environ.get("LOCAL_RANK", "0") == "0"
        ):  # once a host: what one host refuses, the others may not know
            print(f"refused: {error}\n(GLASSLOOP_TRACEBACK=1 shows where)", file=sys.stderr)
        leave()
        return 2
    try:
        code = train(run)
    except (ContractBroken, ReplicasDiffer) as error:
        code = run.broken(error)
    except (
        OSError
    ) as error:  # a disk that takes not even a line: nobody could follow the run any more
        if os.environ.get("GLASSLOOP_TRACEBACK"):
            raise
        print(f"\nended: {error}", file=sys.stderr, flush=True)
        code = 1
    except RuntimeError as error:
        if (lost := run.lost(error)) is None:
            raise
        print(f"\n{lost}", file=sys.stderr, flush=True)
        os._exit(1)  # without the others, the process group could not even be left
    finally:
        run.close()
    if run.rank == 0:
        report_at_the_end(run.folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
