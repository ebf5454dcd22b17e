"""Parts of two_gpus.py about what ranks share, and ranks of two machines. No torch."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import two_gpus_runs as runs
import yaml
from suite import Verdict, failed, judged
from two_gpus_parts import Asked, compared, ended
from two_gpus_runs import Place

# Host memory beside the one copy, of both ranks together: libraries, CUDA, buffers.
BESIDE_GIB = 8.0
SCALING = 0.95  # of twice the rate of one rank that streams alone
SHARDED = 0.98  # of a resident base's speed, over NVLink


def two_hosts(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """Two launchers as two machines, one card each, over the loopback network."""
    title, name = "two machines", "two-hosts"
    file = place.work / "multi_node.yaml"
    config = yaml.safe_load((runs.ROOT / "accelerate_configs/multi_node.yaml").read_text())
    on_cpu = {"use_cpu": True, "gpu_ids": "-1"} if place.device == "cpu" else {}
    file.write_text(yaml.safe_dump(config | on_cpu), encoding="utf-8")
    port = free_port()
    updates = [f"schedule.updates={asked.updates}", "checkpoint.every_updates=null"]
    started = []
    for rank in range(2):
        spot = replace(place, cards=place.cards[rank : rank + 1])
        words = [
            place.python, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "train_loop.py",
            *runs.recipe(place, name, *updates),
        ]  # fmt: skip
        started.append(runs.start(spot, words, f"{name}-{rank}", 1))
    folder, first = place.work / "runs" / name, min(asked.first, asked.updates)
    started[0].reaches(lambda: len(runs.updates_of(folder)) >= first, until)
    for one in started:
        one.process.terminate()  # both machines are told at about the same time
    for one in started:
        runs.end(one, 25.0)
    known, why = reference(place, asked, until)
    if known is None:
        return {title: failed(why, started[0])}
    found = compared(place, folder, known, first, started[0])
    hosts = json.loads((folder / "env.json").read_text()) if found.verdict == "held" else {}
    return {
        title: replace(found, numbers=found.numbers | {"port": port, "gpus": hosts.get("gpus")})
    }


def reference(place: Place, asked: Asked, until: float) -> tuple[Path | None, str]:
    """The recipe's run on two ranks of one machine; made here if no part made it."""
    folder = place.work / "runs" / "peft"
    if len(runs.updates_of(folder)) >= min(asked.first, asked.updates):
        return folder, ""
    folder = folder.with_name("peft-first")
    words = [f"schedule.updates={asked.updates}", "checkpoint.every_updates=null"]
    one = runs.train(place, folder.name, runs.recipe(place, folder.name, *words))
    first = min(asked.first, asked.updates)
    there = one.reaches(lambda: len(runs.updates_of(folder)) >= first, until)
    runs.end(one, 25.0)
    return (folder, "") if there else (None, "the run on one machine did not get there")


def streamed(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """A base on the host, one copy for both ranks: their memory, the losses, the speed."""
    title, out = "streamed base, shared", place.work / "streamed.jsonl"
    model = f"random:llama-70b:{asked.layers}" if place.device == "cuda" else "random:tiny"
    words = [
        place.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "benchmarks/streamed_ranks.py", "--model", model,
        "--tokens", "4096" if place.device == "cuda" else "256", "--turns", "2",
        "--out", str(out),
    ]  # fmt: skip
    one = runs.start(place, words, "streamed", 2)
    code = one.wait(until)
    runs.end(one)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    by_kind = {line["kind"]: line for line in lines}
    if code != 0 or not {"load", "memory", "sharded", "summary"} <= by_kind.keys():
        return {title: failed(ended(code), one)}
    base, held_gib = by_kind["load"]["base_gib"], by_kind["memory"]["host_gib"]
    most, summary = base + BESIDE_GIB, by_kind["summary"]
    names = [name for name in ("host", "sharded") if name in summary]
    other = [name for name in names if not summary[f"{name} loss equal"]]
    told = f"{sum(held_gib):.1f} of at most {most:.1f} GiB of the host for both ranks; "
    told += f"losses of {' and '.join(other)} DIFFER" if other else "losses as with a resident base"
    told += f"; {summary['scaling']:.1%} of twice one rank's speed (mark {SCALING:.0%})"
    if "sharded" in summary:
        told += f"; sharded {summary['sharded of resident']:.1%} of resident (mark {SHARDED:.0%})"
    else:
        told += f"; not sharded: {by_kind['sharded']['refused']}"
    quick = summary["scaling"] >= SCALING and summary.get("sharded of resident", 1.0) >= SHARDED
    held = not other and sum(held_gib) <= most and (quick or place.device == "cpu")
    numbers = {"proportional_gib": held_gib, "base_gib": base, "most_gib": most, **summary}
    return {title: judged(held, told, **numbers)}


def fsdp(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """torch's FSDP2 over PEFT's QLoRA, by benchmarks/fsdp_qlora.py."""
    title, out = "FSDP-QLoRA", place.work / "fsdp.jsonl"
    size = ["70b", f"{asked.layers}"] if place.device == "cuda" else ["tiny", "2"]
    words = [
        place.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "benchmarks/fsdp_qlora.py", "--size", size[0], "--layers", size[1], "--out", str(out),
        *(["--tokens", "32"] if place.device == "cpu" else []),
    ]  # fmt: skip
    one = runs.start(place, words, "fsdp", 2)
    code = one.wait(until)
    runs.end(one)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rates = [line["tokens_per_s"] for line in lines if line["kind"] == "summary"]
    if code != 0 or not rates:
        return {title: failed(ended(code), one, lines=lines[1:])}
    peak = max(line["gib"] for line in lines if line["kind"] == "turn")
    why = f"{rates[0]:,.0f} tokens/s on two ranks, {peak:.1f} GiB of a card ({size[1]} layers)"
    return {title: judged(True, why, tokens_per_s=rates[0], peak_gib=peak, layers=size[1])}


def free_port() -> int:
    """A port of the loopback network that nobody has now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
