"""The training loop. Everything in it follows one formula, line by line:

    N  = sum over ranks and rows of the update's supervised tokens
    g  = sum over ranks and rows of grad(loss_sum) / N         loss_sum: summed token CE, fp32
    c  = min(1, max_norm / |g|)
    theta <- AdamW8bit(theta, c * g, lr(u))                    u = 1 .. U

`update_once` is the formula and `train` the run around it. `glassloop/loop/build.py` builds the run
and `glassloop/loop/replica.py` what one rank computes with. Start it with

    accelerate launch --config_file accelerate_configs/ddp_2gpu.yaml train_loop.py PRESET
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from glassloop.loop.imports import end_of_imports  # first, or it comes too late

# isort: split
import torch
from torch import Tensor

from glassloop.config.arguments import parse
from glassloop.data.batches import Window, build_pass, empty_pass
from glassloop.data.rows import Row
from glassloop.formula.dist import (
    Gate,
    RankReport,
    broadcast_from_rank_0,
    gather_reports,
    reduce_gradients,
)
from glassloop.formula.optim import b_lr_of, l2_norm, step
from glassloop.health.decision import Outcome, Terms, clip_coefficient, describe
from glassloop.loop.build import build_run
from glassloop.loop.capturing import look_before_step, probe_of
from glassloop.loop.evidence import leave_evidence
from glassloop.loop.guard import Guard, end_process
from glassloop.loop.memory import cures, lacks_memory, peak_gib, preflight_done, smaller_passes
from glassloop.loop.process import begun, carried_out
from glassloop.loop.replica import Replica, ReplicasDiffer, SharedPassFailed
from glassloop.loop.run import Run
from glassloop.loop.watchdog import WAITS
from glassloop.predict.hardware import card_here
from glassloop.report.writing import attachment, report_at_the_end

end_of_imports()


def update_once(run: Run, u: int) -> Outcome | None:
    """Do update u and describe it; None if a stop interrupted it.

    Nothing changed then. Raises, on every rank, RanOutOfMemory, ContractBroken or ReplicasDiffer;
    nothing was applied.
    """
    started = time.perf_counter()
    replica, batches, grad = run.replica, run.batches, run.replica.adapters.grad
    run.remember(u)  # random numbers and the like, as they are before the update
    lr = replica.optimizer.param_groups[0]["lr"] = run.plan.lr[u - 1]  # lr(u)
    window = batches.window(u)
    n = 0 if u in run.inspection.left_out else batches.supervised_tokens(window)  # N
    replica.adapters.zero_grad()
    half_way, may_go_on = run.inspection.half_way(window), partial(run.may_go_on, u)
    sums = run_passes(replica, batches.rows, window, n, half_way, may_go_on)  # backward of loss / N
    gate = open_gate(run, window, sums)  # every rank's report, on every rank
    computed = time.perf_counter()
    if not gate.whole:
        return None
    check_contract(run, u, n, gate)  # rows, tokens and lr are the planned ones
    if replica.ddp:
        replica.adapters.check_views()
        grad.mul_(replica.ranks)  # DDP has reduced by now, to the mean
    else:
        reduce_gradients(grad)  # SUM over ranks
    scale = replica.scale.value  # fp16's loss scale, else 1: `grad` is g * scale from here
    norm = broadcast_from_rank_0(l2_norm(grad)).item() / scale  # |g|, rank 0's
    reduced = time.perf_counter()

    run.does(u, "steps")
    b_lr, fp16 = b_lr_of(replica.optimizer), replica.scale.enabled
    by_rank = not replica.ddp and not window.split  # each rank's norm is of rows of its own
    terms = Terms(lr, n, norm, scale, fp16=fp16, explicit=by_rank, b_lr=b_lr)
    decision = run.inspection.decide(batches, window, gate, replica.adapters, terms)
    look = look_before_step(run, window, gate, decision, terms, sums.half)  # read only
    clip = clip_coefficient(norm, decision.max_norm)  # c
    if decision.reason is None:
        if clip != scale:
            grad.mul_(clip / scale)  # c * g
        step(replica.optimizer, replica.adapters)  # theta
    replica.scale.after(finite=math.isfinite(norm))
    times = (started, computed, reduced, time.perf_counter() - look.seconds)
    probe = probe_of(run, u, look.before, applied=decision.reason is None)
    terms = replace(terms, clip=clip, times=times, noise=look.noise, probe=probe)
    return describe(batches, window, gate, decision, terms, run.attempt)


@dataclass(frozen=True)
class PassSums:
    """The sums over one rank's passes.

    Tensors stay on the device until the gate reads them.
    """

    loss_sum: Tensor  # () fp32, nats
    row_loss_sums: Tensor  # (R,) fp32, nats
    half: tuple[Tensor, int] | None  # gradient (N,) and supervised tokens half-way, if asked for
    passes: int
    rows: int
    supervised_tokens: int
    real_tokens: int
    slot_tokens: int
    passes_s: float
    whole: bool
    out_of_memory: bool


def run_passes(
    replica: Replica,
    rows: Sequence[Row],
    window: Window,
    n: int,
    half_way: int | None = None,
    may_go_on: Callable[[str], bool] = lambda _doing: True,
) -> PassSums:
    """Forward and backward of this rank's passes, into the flat gradient.

    Afterwards it holds the rank's share of g, times fp16's loss scale. After a stop or a lack of
    memory it holds less, and the sums say so: nobody may reduce or apply anything then. Raises
    SharedPassFailed for a lack of memory in a pass that other ranks wait in.

    Args:
        rows: all training rows; the window's passes are indices into them.
        n: N of the formula; 0: compute nothing.
        half_way: index of the pass after which gradient and tokens are copied.
        may_go_on: is told what comes next, and returns False if a stop was asked.
    """
    started = time.perf_counter()
    passes = window.computed_by(replica.rank) if n else ()
    # Ranks that share passes, or DDP's, wait for each other inside a pass.
    together, share = replica.ddp or window.split, (replica.rank, replica.ranks)
    losses = [torch.zeros((), device=replica.device)]
    row_losses = [torch.zeros(0, device=replica.device)]
    done = counted = supervised = real = slots = 0
    half, out_of_memory = None, False
    try:
        for index, numbers in enumerate(passes):
            wanted = may_go_on(f"computes pass {index + 1} of {len(passes)}")
            if not wanted and not together:
                break
            last = index == len(passes) - 1
            with nullcontext() if last or not replica.ddp else replica.engine.no_sync():
                p = build_pass(
                    [rows[number] for number in numbers],
                    packed=window.packed,
                    pad_id=replica.pad_id,
                    device=replica.device,
                    share=share if window.split else None,
                )
                loss_sum, row_loss_sums = replica.engine(p)
                (loss_sum * (replica.scale.value / n)).backward()
            losses.append(loss_sum.detach())
            row_losses.append(row_loss_sums)
            done, counted = done + 1, counted + len(row_loss_sums)
            supervised += p.supervised_tokens
            real, slots = real + p.real_tokens, slots + p.slot_tokens
            if index == half_way:
                half = (replica.adapters.grad.clone(), supervised)
        if replica.ddp and n and not passes:
            p = empty_pass(rows[0], pad_id=replica.pad_id, device=replica.device)
            replica.engine(p)[0].backward()  # 0: the other ranks' reduction needs a partner
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        if window.split:
            raise SharedPassFailed(f"rank {replica.rank} ran out of memory: {error}") from None
        out_of_memory = True
    if replica.device.type == "cuda":
        torch.cuda.synchronize(replica.device)  # the gate waits anyway: the rank's own time ends
    return PassSums(
        loss_sum=torch.stack(losses).sum(),
        row_loss_sums=torch.cat(row_losses),
        half=half,
        passes=done if window.passes[replica.rank] else 0,
        rows=counted,
        supervised_tokens=supervised,
        real_tokens=real,
        slot_tokens=slots,
        passes_s=time.perf_counter() - started,
        whole=done == len(passes) and not out_of_memory,
        out_of_memory=out_of_memory,
    )


class RanOutOfMemory(RuntimeError):
    """Raised on every rank if one ran out of memory.

    The update has changed nothing.
    """


def open_gate(run: Run, window: Window, sums: PassSums) -> Gate:
    """Exchange the ranks' reports.

    Raises, on all ranks and before anything is reduced, RanOutOfMemory or ReplicasDiffer.
    """
    run.does(window.update, WAITS)
    adapters = run.replica.adapters
    largest = torch.linalg.vector_norm(adapters.flat.detach(), ord=math.inf)
    read = (
        sums.loss_sum,
        l2_norm(adapters.grad),
        adapters.checksum(run.replica.optimizer),
        largest,
    )
    scalars = torch.stack([scalar.double() for scalar in read])  # (4,); the checksum is < 2**48
    told = torch.cat([scalars, sums.row_loss_sums.double()]).tolist()  # one read by the host
    loss_sum, grad_norm, checksum, largest_weight, *row_loss_sums = told
    own = RankReport(
        whole=sums.whole,
        out_of_memory=sums.out_of_memory,
        stop=run.stop.asked,
        capture=run.capture.asked,
        passes=sums.passes,
        rows=sums.rows,
        supervised_tokens=sums.supervised_tokens,
        real_tokens=sums.real_tokens,
        slot_tokens=sums.slot_tokens,
        passes_s=sums.passes_s,
        peak_gib=peak_gib(run),
        loss_sum=loss_sum,
        grad_norm=grad_norm,
        checksum=int(checksum),
        largest_weight=largest_weight,
        row_loss_sums=tuple(row_loss_sums),
        machine=run.machine.take(),
    )
    ranks = range(run.replica.ranks)
    gate = gather_reports(own, [len(run.batches.share(window, rank)) for rank in ranks])
    if gate.out_of_memory:
        leave_evidence(run, window, gate.out_of_memory)  # before anything reacts to it
        short = ", ".join(map(str, gate.out_of_memory))
        raise RanOutOfMemory(
            f"rank {short} ran out of memory in update {window.update}; nothing was applied. "
            f"Smaller passes with the same rows an update: {cures(run)}"
        )
    if not gate.replicas_agree:
        raise ReplicasDiffer(run.replica.disagreement(f"before update {window.update}"))
    return gate


def check_contract(run: Run, u: int, n: int, gate: Gate) -> None:
    """Compare update u's rows, tokens and lr with plan.json.

    Raises ContractBroken on all ranks.
    """
    if n and run.contract is not None:
        names = ("rows", "supervised_tokens", "real_tokens")
        counted = {name: sum(getattr(report, name) for report in gate.reports) for name in names}
        run.contract.check_update(u, **counted, lr=run.replica.optimizer.param_groups[0]["lr"])


def preflight(run: Run) -> None:
    """Forward and backward of each rank's heaviest pass, without a step.

    Raises ValueError, on all ranks, if it does not fit in memory or is not finite.
    """
    run.remember(run.first_update - 1)
    adapters = run.replica.adapters
    while True:
        window = run.batches.heaviest()
        n = max(1, run.batches.supervised_tokens(window))
        may_go_on = partial(run.may_go_on, window.update)
        adapters.zero_grad()
        try:
            sums = run_passes(run.replica, run.batches.rows, window, n, None, may_go_on)
            gate = open_gate(run, window, sums)
            break
        except RanOutOfMemory as error:
            if not smaller_passes(run, 0, str(error)):
                raise ValueError(f"preflight, before update 1: {error}") from None
    adapters.zero_grad()
    run.put_back()
    preflight_done(run, window, gate)


def train(run: Run) -> int:
    """Train: updates, with evaluations, samples and checkpoints when due.

    Returns the exit code: 0 if the run finished or stopped on demand.
    """
    run.begin()
    if run.config.execution.preflight:
        try:
            preflight(run)
        except ValueError as error:
            return run.refused(str(error))
    run.start()
    u, skipped = run.first_update, 0
    while u <= run.plan.updates and not run.ends_early:
        try:
            outcome = update_once(run, u)
        except RanOutOfMemory as error:
            run.put_back()
            if smaller_passes(run, u, str(error)):
                continue  # the same rows once more
            return run.failed(u, str(error), run.resume_command)
        if outcome is None:
            run.put_back()
            return run.stopped(u - 1, "a stop was asked; the update in progress was given up")
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
    return run.finish(u - 1)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code.

    0: done, or stopped on demand. 130: stopped by Ctrl-C. 1: failed. 2: refused before it began.
    """
    words = sys.argv[1:] if argv is None else argv
    with Guard() as guard:
        run = begun(guard, lambda: build_run(parse(words, cards_here=card_here), guard.stop))
        if isinstance(run, int):
            return run
        return carried_out(run, guard, train, report_at_the_end, attachment)


if __name__ == "__main__":
    end_process(main())
