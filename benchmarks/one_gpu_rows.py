"""The parts of one_gpu.py for long rows, families, the card and the tests. No torch."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import two_gpus_runs as runs
from one_gpu_commands import Command, Ended, Here, Part, lines_in, marked, script
from suite import Verdict, failed, judged

from glassloop.predict.longest import longest_row
from glassloop.predict.shapes import shapes_of
from glassloop.predict.terms import GIB, Work

# Tokens of one row that a card of so many GB is to train.
LONGEST = {8: 15_000, 12: 60_000, 24: 200_000, 80: 700_000}
HOST_GIB = {24: 64.0}
HOST_ASKED = {24: "58"}  # memory.host_gib: the embedding and the base's own pages come on top
# A longer row needs minutes, and more host memory than most machines have.
TRIED = {80: "131072"}
SPEEDS = (16384, 33024, 65536)  # tokens of a row, beside Unsloth on a card of 24 GB
FASTER = 1.25
LEDGER_ERROR = 1.03
TESTS = sorted((runs.ROOT / "tests" / "gpu").glob("test_*.py"))


def long(here: Here, card: int) -> list[Command]:
    host = ("--host-gib", HOST_ASKED[card]) if card in HOST_ASKED else ()
    lengths = here.pick(TRIED.get(card, "longest"), "96")
    return [_rows(here, f"long_{card}", str(card), lengths, *host)]


def long_speed(here: Here) -> list[Command]:
    lengths = here.pick(",".join(map(str, SPEEDS)), "64,96")
    # The longest row's first update takes 12 s; a second one must follow, as Unsloth's does.
    return [_rows(here, "long_speed", "24", lengths, only="rows,unsloth", seconds="15")]


def _rows(
    here: Here,
    name: str,
    cards: str,
    lengths: str,
    *words: str,
    only: str = "rows",
    seconds: str = "10",
) -> Command:
    given = ["--model", here.of("llama-8b"), "--cards", cards, "--lengths", lengths]
    given += ["--seconds", here.pick(seconds, "1"), "--device", here.place.device]
    given += ["--only", only, "--limit", "540"]  # the part's own limit is shorter for most
    out = str(here.work / f"{name}.jsonl")
    return Command(name, script(here, "long_rows.py", *given, *words, "--out", out))


def judge_long(here: Here, _: dict[str, Ended], *, card: int) -> Verdict:
    """The longest row that trained.

    A length that the host's memory ends is below the mark, and the verdict says what ended it.
    """
    cases = lines_in(here.work / f"long_{card}.jsonl", "case")
    trained = [line for line in cases if line["trained"]]
    numbers: dict[str, Any] = {"cases": cases}
    if not trained:
        why = cases[-1].get("error", "no row trained") if cases else "no row was tried"
        return failed(why, **numbers)
    best = max(trained, key=lambda line: line["tokens"])
    host, most = best["host_gib"], HOST_GIB.get(card)
    why = f"{best['tokens']:,} tokens (mark {LONGEST[card]:,}) at {best['tokens_per_s']:,.0f} a s"
    why += f", {host:.1f} GiB of host memory" + (f" (mark {most:g})" if most else "")
    if "peak_gib" in best:
        why += f", peak {best['peak_gib']:.1f} of {best['budget_gib']:.1f} GiB"
    if card in TRIED and here.on_card:
        return _by_ledger(best, card, why, numbers)
    held = best["tokens"] >= LONGEST[card] and (most is None or host <= most)
    return marked(here, held, why, **numbers)


def _by_ledger(best: dict[str, Any], card: int, why: str, numbers: dict[str, Any]) -> Verdict:
    """The longest row that the card's memory holds, by the ledger and its error on the row.

    The ledger's word counts only if the row's peak was not above it by more than LEDGER_ERROR.
    """
    error = best["peak_gib"] / best["predicted_gib"]
    shapes, _ = shapes_of("random:llama-8b")
    assert shapes is not None
    work = Work(rows=1, tokens=1, r=16, targets=tuple(shapes.projections), precision="bf16")
    work = replace(work, profile="fill", base="auto", host_gib=1e6)
    found = longest_row(shapes, work, int(best["budget_gib"] * GIB / max(1.0, error)))
    host = found.host.total_bytes / GIB
    numbers |= {"ledger_error": error, "by_ledger_tokens": found.tokens, "by_ledger_host_gib": host}
    why += f", {error:.3f} of the ledger's; by the ledger {found.tokens:,} fit, with {host:.0f} GiB"
    why += " of host memory: extrapolated, not run"
    return judged(found.tokens >= LONGEST[card] and error <= LEDGER_ERROR, why, **numbers)


def judge_long_speed(here: Here, _: dict[str, Ended]) -> Verdict:
    """Speed beside Unsloth's in the same run. A row that Unsloth cannot train has no mark."""
    cases = lines_in(here.work / "long_speed.jsonl", "case")
    ours, theirs = (
        [line for line in cases if line["engine"] == engine] for engine in ("fused", "unsloth")
    )
    numbers: dict[str, Any] = {"cases": cases}
    if lost := [line for line in ours if not line["trained"]]:
        return failed(f"{lost[0]['tokens']:,} tokens: {lost[0].get('error')}", **numbers)
    rates = {line["tokens"]: line["tokens_per_s"] for line in ours}
    said = ", ".join(f"{tokens:,} tokens at {rate:,.0f} a s" for tokens, rate in rates.items())
    times = {
        line["tokens"]: rates[line["tokens"]] / line["tokens_per_s"]
        for line in theirs
        if line["trained"]
    }
    if not times:
        why = next((line.get("absent") or line.get("error") for line in theirs), "it was not asked")
        return Verdict("held", f"{said}; no mark without Unsloth: {why}", numbers)
    beside = ", ".join(f"{time:.2f}" for time in times.values())
    said += f"; {beside} times Unsloth's (mark {FASTER})"
    return judged(min(times.values()) >= FASTER, said, **numbers, times=times)


def families(here: Here) -> list[Command]:
    words = here.pick((), ("--small", "--layers", "2", "--tokens", "512", "--only", "llama-3-8b"))
    out = ("--out", str(here.work / "families.jsonl"))
    return [Command("families", script(here, "families.py", *words, *out))]


def judge_families(here: Here, _: dict[str, Ended]) -> Verdict:
    path = here.work / "families.jsonl"
    kinds = {kind: lines_in(path, kind) for kind in ("measured", "proof", "failed")}
    bad = [f"{line['model']}: {line['error']}" for line in kinds["failed"]]
    bad += [f"{line['model']}: {line['differs']}" for line in kinds["proof"] if line["differs"]]
    idle = [line["model"] for line in kinds["measured"] if not line["norm"]]
    bad += [f"{model}: a pass without a gradient was timed" for model in idle]
    models = dict.fromkeys(line["model"] for line in kinds["measured"])
    if not models:
        return failed(bad[0] if bad else "no model was measured", **kinds)
    rates = [
        f"{line['model']} {line['tokens_a_s']:,.0f}"
        for line in kinds["measured"]
        if line["rows"] == "full" and line["kernel"] == "chosen"
    ]
    why = f"{len(models)} models, tokens/s on full rows: {', '.join(rates)}"
    return judged(not bad, why + "".join(f"; {one}" for one in bad), **kinds)


def card(here: Here) -> list[Command]:
    out = ("--out", str(here.work / "card.jsonl"))
    words = (here.place.python, "-m", "glassloop.cli", "bench", "--card", *out)
    return [Command("card", words)]


def judge_card(here: Here, ended: dict[str, Ended]) -> Verdict:
    line = ended["card"].said.splitlines()[-1]
    found = (here.work / "card.jsonl").read_text(encoding="utf-8")
    return judged("as expected" in ended["card"].said, line, line=found[:20_000])


def gpu_test(here: Here, file: Path) -> list[Command]:
    start = (here.place.python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    return [Command(file.stem, (*start, str(file.relative_to(runs.ROOT))), may_fail=True)]


def judge_gpu_test(_: Here, ended: dict[str, Ended]) -> Verdict:
    """Held if no test failed and at least one ran; left out if all were skipped."""
    (one,) = ended.values()
    last = one.said.splitlines()[-1:]
    counts = _counts(last[0] if last else "")
    why = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no test ended"
    if one.code not in (0, 5):
        return judged(False, f"{why}; exit code {one.code}", said=one.said)
    if not counts.get("passed"):
        return Verdict("left out" if counts.get("skipped") else "failed", why, {"said": one.said})
    return judged(True, why, **counts)


def _counts(line: str) -> dict[str, int]:
    """Of pytest's last line."""
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", line)
    return {kind: int(count) for count, kind in found}


PARTS: dict[str, Part] = {
    **{
        f"long_{one}": Part(
            {8: 120.0, 12: 150.0, 24: 300.0, 80: 300.0}[one],
            f"{one} GB: {tokens:,} tokens a row",
            partial(long, card=one),
            partial(judge_long, card=one),
        )
        for one, tokens in LONGEST.items()
    },
    "long_speed": Part(
        300.0, "16k, 33k, 66k: 1.25 times Unsloth's speed", long_speed, judge_long_speed
    ),
    "families": Part(560.0, "every family is peft's, and timed", families, judge_families),
    "card": Part(300.0, "card-v1, as expected", card, judge_card, needs_card=True),
    **{
        f"gpu_{file.stem}": Part(
            300.0,
            f"{file.name} of tests/gpu passes",
            partial(gpu_test, file=file),
            judge_gpu_test,
            needs_card=True,
        )
        for file in TESTS
    },
}
# One name for several parts.
TOGETHER = {
    "gpu_tests": [name for name in PARTS if name.startswith("gpu_")],
    "long": [name for name in PARTS if name.startswith("long_")],
}
