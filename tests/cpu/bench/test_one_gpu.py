"""benchmarks/one_gpu.sh: its commands, its verdicts, and what it does not run again."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import one_gpu
import one_gpu_commands
import one_gpu_parts
import one_gpu_speed
import one_gpu_tokenizer
import pytest
from one_gpu_commands import Command, Ended, Here, Part
from suite import Verdict
from two_gpus_runs import Place

TINY = ["--device", "cpu", "--model", "random:tiny"]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The script handles SIGTERM; a test leaves it as it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def place(folder: Path, device: str = "cuda") -> Here:
    return Here(Place(device, "", folder, ("0",)), "", ("data.source=x",), real_rows=False)


def ran(code: int | None = 0, first: float | None = None, said: str = "") -> Ended:
    return Ended(code, 1.0, first, said)


def record(update: int, **changed: Any) -> dict[str, Any]:
    plain = {"update": update, "loss_nats": 5.0 - update / 10, "grad_norm_pre_clip": 0.5}
    plain |= {"lr": 1e-4, "attempt": 1, "update_s": 1.0, "compute_s": 0.9, "reduce_s": 0.0}
    return (
        plain
        | {"rank_passes_s": [0.8], "rank_real_tokens": [60], "rank_peak_gib": [10.4]}
        | changed
    )


def run_in(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def lines(path: Path, *found: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))


def summary(tokens: int, share: float, equal: bool = True) -> dict[str, Any]:
    return {"kind": "summary", "tokens": tokens, "share": share, "loss equal": equal}


def test_a_dry_run_prints_every_command_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert one_gpu.main(["--dry-run", "--work", str(work)]) == 0
    said = capsys.readouterr().out
    assert not work.exists()
    assert [line.split(":")[0][2:] for line in said.splitlines() if line.startswith("# ")] == [
        name for _, names in one_gpu.STAGES for name in names
    ]
    assert "benchmarks/limited.py --gib 11.2 r1_70b_scam model.id=random:llama-70b " in said
    assert "schedule.updates=60" in said and "memory.base=host" in said
    assert "--half-bus" in said and "--tokens 8192" in said and "--tokens 4096,16384" in said
    assert "random:llama-70b:12" in said and said.count("# SIGKILL after update 4") == 1
    words = [shlex.split(line, comments=True) for line in said.splitlines()]
    assert all(line[0].endswith("python") or "=" in line[0] for line in words if line)


def test_what_cannot_be_run_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = tmp_path / "lost"
    for words, why in (
        (["--parts", "limited,other"], "--parts other: there are limited, killed"),
        (["--model", "someone/model"], "--model someone/model: it must be drawn"),
        (["--device", "cpu"], "--device cpu needs --model random:tiny"),
        ([*TINY, "--rows", str(lost)], f"--rows {lost}: there is no such file"),
        ([*TINY, "--tokenizer", str(tmp_path)], "it holds no tokenizer.json"),
        ([*TINY, "--updates", "0"], "--updates 0: it must be 1 or more"),
    ):
        assert one_gpu.main(words) == 2, words
        assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "held"),
        ({"rank_peak_gib": [10.51]}, "missed"),
        ({"rank_peak_gib": None}, "failed"),
        ({"loss_nats": 9.0}, "missed"),
        ({"loss_nats": None}, "failed"),
    ],
)
def test_the_limited_run_has_a_peak_and_a_falling_loss(
    tmp_path: Path, changed: dict[str, Any], verdict: str
) -> None:
    records = [record(update) for update in range(1, 60)] + [record(60, **changed)]
    if changed.get("loss_nats"):
        records = [*records[:-5], *(record(update, **changed) for update in range(56, 61))]
    run_in(tmp_path / "runs" / "limited", records)
    assert one_gpu_parts.judge_limited(place(tmp_path), {}).verdict == verdict


def killed_in(folder: Path, *, attempt: int = 2, loss: float = 4.5, weights: str = "w") -> None:
    for name, redone in (("whole", 1), ("cut", attempt)):
        run = folder / "runs" / name
        own = loss if name == "cut" else 4.5
        run_in(
            run, [record(u, attempt=redone, loss_nats=own if u == 5 else 4.0) for u in range(1, 7)]
        )
        saved = run / "checkpoints" / "update_000006"
        saved.mkdir(parents=True)
        text = weights if name == "cut" else "w"
        (saved / "adapter_model.safetensors").write_text(text)


@pytest.mark.parametrize(
    ("changed", "replayed", "verdict"),
    [
        ({}, True, "held"),
        ({}, False, "missed"),
        ({}, None, "missed"),
        ({"loss": 4.5 + 1e-15}, True, "missed"),
        ({"weights": "v"}, True, "missed"),
        ({"attempt": 1}, True, "failed"),
    ],
)
def test_a_killed_run_is_resumed_and_replayed_bit_for_bit(
    tmp_path: Path, changed: dict[str, Any], replayed: bool | None, verdict: str
) -> None:
    killed_in(tmp_path, **changed)
    said = "" if replayed is None else json.dumps({"bit_for_bit": replayed})
    (tmp_path / "replay.log").write_text(f"a note\n{said}\n")
    assert one_gpu_parts.judge_killed(place(tmp_path), {}).verdict == verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([summary(4096, 0.98), summary(16384, 0.995)], "held"),
        ([summary(4096, 0.979), summary(16384, 0.999)], "missed"),
        ([summary(4096, 0.99), summary(16384, 0.994)], "missed"),
        ([summary(4096, 0.99), summary(16384, 0.999, equal=False)], "missed"),
        ([summary(4096, 0.99)], "failed"),
        ([], "failed"),
    ],
)
def test_a_streamed_base_is_as_fast_as_a_resident_one(
    tmp_path: Path, found: list[dict[str, Any]], verdict: str
) -> None:
    lines(tmp_path / "streamed.jsonl", {"kind": "environment"}, *found)
    assert one_gpu_parts.judge_streamed(place(tmp_path), {}).verdict == verdict
    bits = one_gpu_parts.judge_streamed(place(tmp_path, "cpu"), {})
    expected = "failed" if not found else "missed" if not found[-1]["loss equal"] else "held"
    assert bits.verdict == expected  # a CPU is held to bits alone


def test_the_small_card_has_a_peak_and_a_speed(tmp_path: Path) -> None:
    def verdict(peak: float, share: float) -> str:
        folder = tmp_path / f"{peak}-{share}"
        run_in(folder / "runs" / "small", [record(u, rank_peak_gib=[peak]) for u in (1, 2, 3)])
        lines(folder / "small_speed.jsonl", summary(4096, share))
        return one_gpu_parts.judge_small(place(folder), {}).verdict

    assert [verdict(3.3, 0.97), verdict(3.31, 0.97), verdict(3.3, 0.96)] == [
        "held",
        "missed",
        "missed",
    ]


def test_the_records_cost_is_judged_by_its_shares_of_an_update(tmp_path: Path) -> None:
    def verdict(recorded=0.002, probed=0.1, sampler: float | None = 0.002) -> str:
        shares = {} if sampler is None else {"share_of_an_update": sampler}
        # What the other rows say counts for nothing.
        full = {"recorded_costs": recorded, "probed_costs": 1.0, "sampler": shares}
        short = {"recorded_costs": 1.0, "probed_costs": probed, "sampler": {}}
        (tmp_path / "record-full-v1.jsonl").write_text(json.dumps(full))
        (tmp_path / "record-scam-v1.jsonl").write_text(json.dumps(short))
        return one_gpu_parts.judge_record(place(tmp_path), {}).verdict

    assert verdict() == "held" and verdict(sampler=None) == "failed"
    assert {verdict(recorded=0.0021), verdict(probed=0.101), verdict(sampler=0.0021)} == {"missed"}


def speed_lines(folder: Path, rates: dict[str, float], gib: float) -> None:
    """Lines of `glassloop bench` for all cases of the part `speed`, by name."""
    lines = []
    for name, case in one_gpu_speed.CASES.items():
        varied = [f"memory.profile={case.profile}"]
        cell = {"workload": case.workload, "layout": case.layout, "varied": varied}
        lines.append({
            "kind": "bench", "schema": 1, "cell": cell, "rows_digest": "d",
            "check": {"within": True}, "check_only": False,
            "machine": {"gpus": [], "git": None, "packages": {}}, "peak": {"allocated_gib": gib},
            "tokens_per_s": {"real": rates.get(name, 20_000.0)},
        })  # fmt: skip
    (folder / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_speed_below_its_mark_comes_with_its_profile(tmp_path: Path) -> None:
    page = tmp_path / "profiles" / "fused-full-v1-packed-memory-profile-23-5-update-4"
    page.mkdir(parents=True)
    (page / "summary.md").write_text("# Update 4\n\nmatrix products\n")

    best, within, least, padded = one_gpu_speed.CASES

    def verdict(rates: dict[str, float], gib: float = 6.0) -> Verdict:
        speed_lines(tmp_path, rates, gib)
        return one_gpu_speed.judge_speed(place(tmp_path), {})

    assert verdict({}).verdict == "held" and "full rows 20,000 (mark 18,500)" in verdict({}).why
    for name, rate in ((best, 18_499), (least, 13_999), (padded, 15_999)):
        assert verdict({name: rate}).verdict == "missed"
    slow = verdict({within: 17_499})
    numbers = slow.numbers[within]
    assert slow.verdict == "missed" and numbers["profile"][-1] == "matrix products"
    assert "profile" not in slow.numbers[best]
    assert verdict({}, gib=6.3).verdict == "missed"  # more than `min` may take


def test_a_start_is_judged_when_it_is_warm(tmp_path: Path) -> None:
    for name in ("start_8b_made", "start_8b_cold", "start_8b_warm"):
        run_in(tmp_path / "runs" / name, [record(1)])

    def verdict(warm: float | None) -> Verdict:
        ended = {"start_8b_made": ran(first=60.0), "start_8b_cold": ran(first=20.0)}
        return one_gpu_parts.judge_start_8b(
            place(tmp_path), ended | {"start_8b_warm": ran(first=warm)}
        )

    assert [verdict(seconds).verdict for seconds in (10.0, 10.1, None)] == [
        "held",
        "missed",
        "failed",
    ]
    assert "made 60.0 s, cold 20.0 s, warm 10.0 s" in verdict(10.0).why


def part_of(code: str, judge: Any, **options: Any) -> Part:
    def commands(here: Here) -> list[Command]:
        return [Command("one", (here.place.python, "-c", code), **options)]

    return Part(30.0, "a mark", commands, judge)


def test_parts_of_the_file_are_not_run_again_but_failed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held(here: Here, ended: dict[str, Ended]) -> Verdict:
        return Verdict("held", here.work.name, {})

    parts = {"good": part_of("", held), "bad": part_of("raise SystemExit(3)", held)}
    monkeypatch.setattr(one_gpu, "PARTS", parts)
    monkeypatch.setattr(one_gpu, "STAGES", ((30.0, ("good",)), (30.0, ("bad",))))
    machine = {"gpus": [], "cpu": "c", "git": {"commit": "1"}, "packages": {"torch": "2"}}
    monkeypatch.setattr(one_gpu, "machine_of", lambda *_: (machine | {"host_spare_gib": 1}, ""))
    out, work = tmp_path / "one.json", tmp_path / "work"
    words = [*TINY, "--parts", "good,bad", "--out", str(out), "--work", str(work)]
    assert one_gpu.main(words) == 1
    first = json.loads(out.read_text())["parts"]
    assert first["bad"]["why"] == "one: exit code 3" and first["good"]["lines"]
    machine["git"] = {"commit": "2"}
    assert one_gpu.main(words) == 1
    assert "good is in" in capsys.readouterr().out
    second = json.loads(out.read_text())["parts"]
    assert second["good"] == first["good"] and second["bad"]["git"] == {"commit": "2"}
    assert (work / "bad-2").is_dir() and not (work / "good-2").exists()
    assert one_gpu.main([*words, "--again", "--parts", "good"]) == 0
    third = json.loads(out.read_text())["parts"]
    assert third["good"]["why"] == "good-2" and third["bad"] == second["bad"]
    assert one_gpu.main([*words, "--updates", "7"]) == 2
    assert "name another file" in capsys.readouterr().err
    out.write_text("[]")
    assert one_gpu.main(words) == 2 and out.read_text() == "[]"


def test_a_command_is_killed_at_its_update_and_cut_off_at_its_time(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cut"
    code = f"""
import pathlib, time
run = pathlib.Path({str(run)!r})
(run / "checkpoints" / "update_000003").mkdir(parents=True)
with open(run / "metrics.jsonl", "w") as file:
    for number in range(100):
        file.write("{{}}\\n"); file.flush(); time.sleep(0.05)
"""
    words = (place(tmp_path).place.python, "-c", code)
    here = place(tmp_path, "cpu")
    now = one_gpu_commands.time.monotonic()
    one = one_gpu_commands.run_command(here, Command("cut", words, 4, run), now + 20)
    assert one.code == -9 and one.first_update_s is not None and one.first_update_s < 4
    assert 4 <= len((run / "metrics.jsonl").read_text().splitlines()) < 40
    slow = Command("slow", (words[0], "-c", "import time; time.sleep(60)"))
    one = one_gpu_commands.run_command(here, slow, one_gpu_commands.time.monotonic() + 0.5)
    assert one.code is None and one.seconds < 10


def test_a_real_tokenizer_lies_in_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "tokenizer.json").write_text("a tokenizer")
    (real / "weights.bin").write_text("none of it")
    own = one_gpu.here_of(
        one_gpu._parser().parse_args([*TINY, "--tokenizer", str(real)]), place(tmp_path).place
    )
    assert own.variables == {"GLASSLOOP_CACHE": str(tmp_path / "cache")}
    monkeypatch.setenv("GLASSLOOP_CACHE", own.variables["GLASSLOOP_CACHE"])
    one_gpu_tokenizer.give(real, ["random:tiny"])
    (folder,) = (tmp_path / "cache").glob("random-tiny-*")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "a tokenizer"
