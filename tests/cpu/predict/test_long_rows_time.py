"""Predicted speed of long rows: host tiers, chunks, and copies that are not hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glassloop.predict.fused_time import fused_pass_time
from glassloop.predict.longest import LONG, row_speeds
from glassloop.predict.roofline import PassTime, attention_rates
from glassloop.predict.shapes import KNOWN
from glassloop.predict.terms import Work
from glassloop.predict.tiers import Tiers
from glassloop.predict.time_checks import FUSED_CHECKED, errors

R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
GIB = 2**30


def seconds(tokens: int, tiers: Tiers, card: str = "H200") -> PassTime:
    found = fused_pass_time(R1, card, rows=1, row_tokens=tokens, tiers=tiers)
    assert found is not None
    return found


def test_predicted_speeds_of_long_rows_are_within_5_percent_of_what_they_were_fitted_to():
    found = [one for one in errors("fused") if one[0].row_tokens >= 16384]
    assert [one.row_tokens for one, *_ in found] == list(LONG)
    assert all(abs(error) < 0.05 for *_, error in found)


def test_a_long_row_is_predicted_no_slower_than_it_was_measured():
    """An only update compiled its kernels, and some shared the card: the true speed is higher."""
    file = RESULTS / "long-rows-h200.jsonl"
    cases = [json.loads(line) for line in file.read_text().splitlines()]
    ours = [line for line in cases if line["kind"] == "case" and "tiers" in line]
    cases = [line for line in ours if line["trained"]]
    assert len(cases) >= 7
    for line in cases:
        one = seconds(line["tokens"], Tiers.of(line["tiers"]))
        ratio = line["tokens"] / one.seconds / line["tokens_per_s"]
        assert 1.0 <= ratio < (1.6 if len(line["updates_s"]) == 1 else 1.15), line["tokens"]


def test_what_waits_on_the_host_is_not_computed_again():
    nothing, inputs, attention, everything = (
        seconds(65536, Tiers(1, host)).gpu_s for host in ("nothing", "inputs", "attention", "all")
    )
    assert nothing == inputs
    rate, _ = attention_rates("H200", 65536)
    once = R1.layers * 2 * 65536 * R1.q_width * 65536 / rate * 31 / 32
    assert inputs - attention == pytest.approx(once)
    o = 2 * 65536 * R1.hidden * R1.q_width * 31 / (760e12 * 0.95)
    assert attention - everything == pytest.approx(o)


def test_chunks_cost_copies_and_launches_and_little_time():
    whole, cut = (seconds(32768, Tiers(0, "all", chunk=chunk)) for chunk in (0, 8192))
    assert 1 < cut.gpu_s / whole.gpu_s < 1.03
    assert cut.host_s == pytest.approx(4 * whole.host_s)
    assert seconds(8192, Tiers(0, "all", chunk=8192)) == seconds(8192, Tiers(0, "all"))


def test_tensors_that_a_slow_link_brings_too_late_cost_time():
    assert seconds(2048, Tiers(1, "all")).waits_s == 0
    slow = fused_pass_time(R1, "4090", rows=1, row_tokens=256, tiers=Tiers(1, "all", streamed=32))
    alone = fused_pass_time(R1, "4090", rows=1, row_tokens=256, tiers=Tiers(1, "all"))
    assert slow is not None and alone is not None
    assert slow.waits_s > alone.waits_s == 0
    # Backward brings layers and tensors through one link; forward sends one and brings the other.
    tensors = 31 * 256 * 2 * 3 * R1.hidden / 24e9
    bare = fused_pass_time(R1, "4090", rows=1, row_tokens=256, tiers=Tiers(1, streamed=32))
    assert bare is not None
    gained = slow.waits_s - bare.waits_s
    computing = bare.gpu_s - bare.waits_s - (slow.gpu_s - slow.waits_s)
    assert gained == pytest.approx(tensors + computing, rel=1e-6)


def test_a_plan_says_the_speed_of_the_rows_that_fit():
    work = Work(rows=1, tokens=1, r=16, targets=("q_proj",), host_gib=60.0)
    speeds = row_speeds("4090", R1, work, 23 * GIB, 40_000)
    assert [one.tokens for one in speeds] == [16384, 32768, 40_000]
    assert speeds[0].tokens_per_s > speeds[1].tokens_per_s > speeds[2].tokens_per_s > 0
    assert row_speeds("T4", R1, work, 23 * GIB, 40_000) == ()
    assert row_speeds("4090", R1, work, 23 * GIB, 0) == ()


def test_short_rows_are_predicted_as_before_attention_of_long_ones_was_known():
    assert attention_rates("H100", 2048) == pytest.approx((225e12, 200e12))
    assert attention_rates("4090", 1 << 20) == (95e12, 75e12)
    assert sum(one.row_tokens < 4096 for one in FUSED_CHECKED) == 6
