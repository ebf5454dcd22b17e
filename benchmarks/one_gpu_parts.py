"""The parts of one_gpu.py that train and stream: commands and marks. No torch."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import two_gpus_runs as runs
from one_gpu_commands import (
    Command,
    Ended,
    Here,
    Part,
    lines_in,
    marked,
    script,
    training,
)
from suite import Verdict, failed, judged

LIMIT_GIB, PEAK_GIB = 11.2, 10.5  # of a 12 GB card
SHARES = {4096: 0.98, 16384: 0.995}  # of a resident base's speed, by tokens a pass
HALF_BUS = 0.97
SMALL_GIB, SMALL_SHARE = 3.3, 0.97
START_S = {"8b": 10.0, "70b": 45.0}
RECORDED = ("full-v1", "scam-v1")
RECORD = {"the record": 0.002, "probes, every 10th": 0.01, "reading the machine": 0.002}
KILL_AT, LAST, CAPTURED = 4, 6, 5
EDGE = 5  # updates at each end whose losses are compared


def limited(here: Here) -> list[Command]:
    words = [f"schedule.updates={here.updates}", *_rows_of(here, 600)]
    before = ("benchmarks/limited.py", "--gib", f"{LIMIT_GIB:g}")
    model = here.of("llama-70b")
    one = training(here, "limited", model, *words, preset="r1_70b_scam", before=before)
    return [one]


def judge_limited(here: Here, _: dict[str, Ended]) -> Verdict:
    updates = runs.updates_of(here.work / "runs" / "limited")
    losses = [line["loss_nats"] for _, line in sorted(updates.items())]
    numbers: dict[str, Any] = {"updates": len(updates), **runs.speed(updates)}
    if len(losses) < here.updates or None in losses:
        return failed(f"{len(losses)} of {here.updates} updates", **numbers)
    edge = min(EDGE, max(1, len(losses) // 2))
    first, last = (statistics.mean(part) for part in (losses[:edge], losses[-edge:]))
    numbers |= {"losses": losses, "loss_first": first, "loss_last": last}
    why = f"{len(losses)} updates, loss {first:.3f} to {last:.3f}"
    if not last < first:
        return judged(False, f"{why}: it does not fall", **numbers)
    peak = numbers["peak_gib"]
    if peak is None and here.on_card:
        return failed(f"{why}; the records hold no peak", **numbers)
    why += "" if peak is None else f", peak {peak:.2f} of at most {PEAK_GIB} GiB"
    return marked(here, (peak or 0.0) <= PEAK_GIB, why, **numbers)


def killed(here: Here) -> list[Command]:
    model = here.of("llama-70b", here.layers)
    words = [
        "execution.deterministic=true", f"schedule.updates={LAST}", "schedule.warmup_updates=2",
        "checkpoint.every_updates=3", f"record.capture_updates=[{CAPTURED}]", *_rows_of(here, 120),
    ]  # fmt: skip
    cut = here.work / "runs" / "cut"
    resume = runs.launched(here.place, ["train_loop.py", "--resume", str(cut)], 1)
    replay = [here.place.python, "-m", "glassloop.cli", "replay", str(cut)]
    return [
        training(here, "whole", model, *words, preset="r1_70b_scam"),
        training(here, "cut", model, *words, preset="r1_70b_scam", kill_at=KILL_AT),
        Command("resumed", tuple(resume)),
        Command("replay", (*replay, "--update", str(CAPTURED), "--json")),
    ]


def judge_killed(here: Here, _: dict[str, Ended]) -> Verdict:
    whole, cut = here.work / "runs" / "whole", here.work / "runs" / "cut"
    theirs, ours = runs.updates_of(whole), runs.updates_of(cut)
    fields = ("loss_nats", "grad_norm_pre_clip", "lr")
    differing = [
        update
        for update in range(1, LAST + 1)
        if any(ours.get(update, {}).get(one) != theirs[update][one] for one in fields)
    ]
    again = [update for update, line in sorted(ours.items()) if line["attempt"] > 1]
    sums = [_adapter_sum(folder) for folder in (whole, cut)]
    replayed = _json_in(here.work / "replay.log")
    numbers: dict[str, Any] = {
        "differing": differing,
        "done_again": again,
        "adapters_sha256": sums,
        "replay_bit_for_bit": replayed.get("bit_for_bit"),
    }
    if not again:
        return failed("nothing was done again: the kill came too late", **numbers)
    held = not differing and sums[0] == sums[1] and replayed.get("bit_for_bit") is True
    why = f"updates {again[0]} to {again[-1]} done again, update {CAPTURED} replayed: "
    why += "bit for bit" if held else f"NOT bit for bit ({differing=})"
    return judged(held, why, **numbers)


def half_bus(here: Here) -> list[Command]:
    model = here.of("llama-70b", here.layers)
    tokens = here.pick("8192", "64")
    return [_beside(here, "half_bus", model, tokens, "--half-bus", "--turns", "2")]


def streamed(here: Here) -> list[Command]:
    tokens = here.pick(",".join(map(str, SHARES)), "64,96")
    model = here.of("llama-70b", here.layers)
    return [_beside(here, "streamed", model, tokens, "--turns", "3")]


def small(here: Here) -> list[Command]:
    model, tokens = here.of("llama-8b"), here.pick(2048, 256)
    words = [
        "schedule.updates=6", "execution.layout=packed", f"execution.pass_tokens={tokens}",
        f"data.max_tokens={tokens}", "memory.profile=min", *_rows_of(here, 120),
    ]  # fmt: skip
    beside = _beside(here, "small_speed", model, here.pick("4096", "64"), "--turns", "3")
    return [training(here, "small", model, *words), beside]


def _beside(here: Here, name: str, model: str, tokens: str, *words: str) -> Command:
    """A base on the card beside the same base streamed."""
    longest = here.pick("2048", "40")
    given = ["--model", model, "--tokens", tokens, "--longest", longest]
    given += ["--device", here.place.device, "--out", str(here.work / f"{name}.jsonl")]
    return Command(name, script(here, "streamed.py", *given, *words))


def shares(here: Here, name: str) -> dict[int, dict[str, Any]]:
    """Tokens a pass -> the comparison's summary."""
    found = lines_in(here.work / f"{name}.jsonl", "summary")
    return {line["tokens"]: line for line in found}


def judge_half_bus(here: Here, _: dict[str, Ended]) -> Verdict:
    return _judge_shares(here, "half_bus", {8192: HALF_BUS})


def judge_streamed(here: Here, _: dict[str, Ended]) -> Verdict:
    return _judge_shares(here, "streamed", SHARES)


def _judge_shares(here: Here, name: str, marks: dict[int, float]) -> Verdict:
    found = shares(here, name)
    numbers: dict[str, Any] = {f"{tokens} tokens": line for tokens, line in found.items()}
    if not found or (here.on_card and (missing := marks.keys() - found.keys())):
        missing = marks.keys() - found.keys()
        return failed(f"not measured: {sorted(missing)} tokens", **numbers)
    if odd := [tokens for tokens, line in found.items() if not line["loss equal"]]:
        return judged(False, f"the losses differ at {odd[0]} tokens", **numbers)
    said = ", ".join(
        f"{tokens:,} tokens {line['share']:.1%}"
        + (f" (mark {marks[tokens]:.1%})" if tokens in marks else "")
        for tokens, line in found.items()
    )
    held = all(line["share"] >= marks.get(tokens, 0.0) for tokens, line in found.items())
    return marked(here, held, f"of a resident base's speed: {said}", **numbers)


def judge_small(here: Here, _: dict[str, Ended]) -> Verdict:
    peak = runs.speed(runs.updates_of(here.work / "runs" / "small")).get("peak_gib")
    (line,) = shares(here, "small_speed").values()
    numbers = {"peak_gib": peak, "speed": line}
    if peak is None and here.on_card:
        return failed("the records hold no peak", **numbers)
    said = "no peak" if peak is None else f"peak {peak:.2f} of at most {SMALL_GIB} GiB"
    why = f"{said}; {line['share']:.1%} of a resident base's speed (mark {SMALL_SHARE:.0%})"
    held = (peak or 0.0) <= SMALL_GIB and line["share"] >= SMALL_SHARE
    return marked(here, held, why, **numbers)


def start_8b(here: Here) -> list[Command]:
    """The base made, then compiled kernels from none, then all as a second start finds it."""
    return _starts(here, "8b", here.of("llama-8b"), "r1_8b_scam", cold=True)


def start_70b(here: Here) -> list[Command]:
    return _starts(here, "70b", here.of("llama-70b"), "r1_70b_scam", cold=False)


def _starts(here: Here, size: str, model: str, preset: str, *, cold: bool) -> list[Command]:
    words = ["schedule.updates=2", "schedule.warmup_updates=1", "checkpoint.every_updates=null"]
    words += _rows_of(here, 120)
    # A folder without compiled kernels.
    empty = {"TRITON_CACHE_DIR": str(here.work / "no-kernels")}
    made = training(here, f"start_{size}_made", model, *words, preset=preset)
    warm = training(here, f"start_{size}_warm", model, *words, preset=preset)
    if not cold:
        return [made, warm]
    first = training(
        here, f"start_{size}_cold", model, *words, preset=preset, variables=tuple(empty.items())
    )
    return [made, first, warm]


def judge_start_8b(here: Here, ended: dict[str, Ended]) -> Verdict:
    return _judge_start(here, "8b", ended)


def judge_start_70b(here: Here, ended: dict[str, Ended]) -> Verdict:
    return _judge_start(here, "70b", ended)


def _judge_start(here: Here, size: str, ended: dict[str, Ended]) -> Verdict:
    found = {name: one.first_update_s for name, one in ended.items()}
    if lacking := [name for name, seconds in found.items() if seconds is None]:
        return failed(f"{lacking[0]} recorded no update", **found)
    said = ", ".join(
        f"{name.rpartition('_')[2]} {seconds:.1f} s" for name, seconds in found.items()
    )
    why = f"launch to first update: {said} (mark, warm: {START_S[size]:g} s)"
    updates = {name: runs.updates_of(here.work / "runs" / name)[1]["update_s"] for name in ended}
    held = (found[f"start_{size}_warm"] or 0.0) <= START_S[size]
    return marked(here, held, why, **found, first_update_alone_s=updates)


def record(here: Here) -> list[Command]:
    return [_record(here, workload) for workload in RECORDED]


def _record(here: Here, workload: str) -> Command:
    out = ("--out", str(here.work / f"record-{workload}.jsonl"))
    words = ("--workload", workload, "--rounds", here.pick("4", "2"))
    words += ("execution.engine=fused", "execution.layout=packed")
    words += () if here.on_card else ("execution.precision=fp32",)
    name = f"record_{workload.partition('-')[0]}"
    return Command(name, script(here, "record_cost.py", here.of("llama-8b"), *words, *out))


def judge_record(here: Here, _: dict[str, Ended]) -> Verdict:
    """The record's share of an update of full rows, the probes' of one of short rows."""
    full, short = (
        json.loads((here.work / f"record-{one}.jsonl").read_text("utf-8")) for one in RECORDED
    )
    sampler = full["sampler"].get("share_of_an_update")
    if sampler is None:
        return failed(f"the card is not read: {full['sampler'].get('failed')}", full=full)
    found = {
        "the record": full["recorded_costs"],
        "probes, every 10th": short["probed_costs"] / 10,
        "reading the machine": sampler,
    }
    told = (f"{name} {found[name]:.2%} (mark {most:.1%})" for name, most in RECORD.items())
    held = all(found[name] <= most for name, most in RECORD.items())
    why = f"of an update: {', '.join(told)}; the record {short['recorded_costs']:.2%} of short rows"
    return marked(here, held, why, full=full, short=short, shares=found)


def _rows_of(here: Here, rows: int) -> list[str]:
    return [f"data.rows={here.pick(rows, min(rows, 64))}"]


def _adapter_sum(folder: Path) -> str:
    file = folder / "checkpoints" / f"update_{LAST:06d}" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _json_in(log: Path) -> dict[str, Any]:
    """The last line of a log that is an object; {} if there is none."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


PARTS: dict[str, Part] = {
    "limited": Part(
        560.0,
        f"70B in {LIMIT_GIB} GiB: peak at most {PEAK_GIB} GiB, the loss falls",
        limited,
        judge_limited,
    ),
    "killed": Part(240.0, "kill -9, resume, replay: bit for bit", killed, judge_killed),
    "half_bus": Part(150.0, f"8,192 tokens: {HALF_BUS:.0%}", half_bus, judge_half_bus),
    "streamed": Part(240.0, "4,096 tokens: 98 %, 16,384: 99.5 %", streamed, judge_streamed),
    "small": Part(240.0, f"8B: {SMALL_GIB} GiB; {SMALL_SHARE:.0%} of min", small, judge_small),
    "start": Part(300.0, "8B: 10 s", start_8b, judge_start_8b),
    "record": Part(
        240.0, "record 0.2 %, probes 1 %, sampler 0.2 % of an update", record, judge_record
    ),
    "start_70b": Part(420.0, "70B: 45 s", start_70b, judge_start_70b),
}
