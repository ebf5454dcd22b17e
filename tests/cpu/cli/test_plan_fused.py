"""`glassloop plan` for the engine fused, by card."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from planned import as_json, flat, said

from glassloop.cli import plan as command
from glassloop.plan.outlook import card_time, plan_of
from glassloop.predict.hardware import Present
from glassloop.predict.roofline import pass_time
from glassloop.predict.shapes import KNOWN

R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("no_cards")


def test_the_fused_engine_is_planned_by_card(capsys):
    text = flat(said(capsys, "r1_8b_scam", "execution.engine=fused"))
    assert "activations kept as memory.profile=fill allows" in text
    assert "memory.profile: all kept, and min" in text
    assert re.search(r"4090 23\.5 3\.6 2[23]\.\d 0\.\d fits: 32/32 kept, 8 in 16 bits", text)
    assert re.search(r"4070 11\.7 3\.6 1[01]\.\d 0\.\d fits: \d/32 kept", text)
    assert (
        "H100, 2 x 2,048 tokens a pass, all layers kept: +2%" in text
    )  # what its time was checked against
    assert "not modelled" not in text
    found = as_json(capsys, "r1_8b_scam", "execution.engine=fused")
    assert found["memory_of"] == ["all kept", "min"] and found["memory_bytes_other_base"] is None
    assert found["memory_bytes"]["peak"] / 2**30 == pytest.approx(18.3, abs=0.2)
    assert found["memory_bytes_other_tiers"]["peak"] / 2**30 == pytest.approx(6.2, abs=0.2)
    assert all(card["fits"] for card in found["cards"])
    assert all(card["kept"] == 32 for card in found["cards"] if card["has_gib"] > 20)
    peft = {
        one["card"]: one["tokens_per_s"]
        for one in as_json(capsys, "r1_8b_scam", "execution.engine=peft")["time_predicted"]
    }
    for one in found["time_predicted"]:
        assert 1.4 * peft[one["card"]] < one["tokens_per_s"] < 3 * peft[one["card"]], one


def test_little_memory_is_planned_too(capsys):
    least = as_json(capsys, "r1_8b_scam", "execution.engine=fused", "memory.profile=min")
    assert least["memory_of"] == ["min", "all kept"]
    card = least["cards"][0]
    assert card["kept"] == 1 and card["needed_gib"] < 7.5 and "on the host" in card["tiers"]
    assert card["faster"] == "memory.profile=fill, 32 of 32 layers kept"
    on_gpu = as_json(
        capsys, "r1_8b_scam", "execution.engine=fused", "memory.profile=min", "memory.host_gib=0"
    )
    assert (
        1.5 < on_gpu["cards"][0]["needed_gib"] - card["needed_gib"] < 2.5
    )  # inputs of all layers, and the embedding
    budget = as_json(capsys, "r1_8b_scam", "execution.engine=fused", "memory.profile=12")
    assert (
        budget["memory_of"] == ["12 GiB", "min"]
        and 10.5 * 2**30 < budget["memory_bytes"]["peak"] < 12 * 2**30
    )
    slow, fast = (
        plan["time_predicted"][0]["tokens_per_s"]
        for plan in (budget, as_json(capsys, "r1_8b_scam", "execution.engine=fused"))
    )
    assert slow < fast
    stored = as_json(
        capsys, "r1_8b_scam", "execution.engine=fused", "execution.checkpointing=false"
    )
    assert stored["memory_of"] == ["all kept", "min"] and stored["cards"][0]["held"] == 0


def test_packed_passes_are_as_large_as_a_card_has_room_for(capsys, monkeypatch):
    words = ("r1_8b_scam", "execution.engine=fused", "execution.layout=packed", "--ranks", "1")
    found = {card["card"]: card["pass_tokens"] for card in as_json(capsys, *words)["cards"]}
    assert 4096 < found["3090"] < 6144 and found["A100-40"] > 9000
    assert found["H100"] < found["H200"] == 32_768  # of 16 rows of 2,048: all of an update
    assert f"packed, the same rows in passes of at most {found['3090']:,} tokens" in flat(
        said(capsys, *words)
    )
    tight = as_json(capsys, *words, "memory.profile=8")["cards"]
    assert {card["pass_tokens"] for card in tight} == {
        2048
    }  # the longest row has to fit, whatever is kept
    size = found["3090"]
    speeds = [
        as_json(capsys, *words, "--row-tokens", "400", *more)["time_predicted"][0]["tokens_per_s"]
        for more in ((), (f"execution.pass_tokens={size}",), ("execution.pass_tokens=4096",))
    ]
    assert speeds[0] == speeds[1] != speeds[2]  # the time is that of the chosen size
    asked = {
        card["pass_tokens"]
        for card in as_json(capsys, *words, "execution.pass_tokens=3072")["cards"]
    }
    least = {card["pass_tokens"] for card in as_json(capsys, *words, "memory.profile=min")["cards"]}
    assert (asked, least) == ({3072}, {4096})
    own = Present("NVIDIA A100-SXM4-40GB", 39.5, 39.0, "580.1", (8, 0))
    monkeypatch.setattr(command, "NVIDIA", str(ROOT))
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: (own,))
    assert re.search(
        r"at most (9|10),\d+ tokens \(--with-data counts them\), on a card like A100-40",
        flat(said(capsys, *words)),
    )


def test_an_unknown_card_has_no_speed():
    assert pass_time(R1, "T4", rows=2, row_tokens=100) is None
    from glassloop.config.arguments import parse

    config = parse(["r1_8b_scam"])
    plan = plan_of(config, 600, 2)
    assert card_time(config, plan, R1, "unheard of", 350.0) is None
    short, long = (card_time(config, plan, R1, "H100", tokens) for tokens in (350.0, 2048.0))
    assert short.host_bound and short.tokens_per_s < long.tokens_per_s


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("words", [["r1_8b_scam", "--hardware", "2x3090"], ["r1_8b_notebook"]])
def test_a_plan_fits_the_terminal(columns, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = said(capsys, *words).splitlines()
    wide = [line for line in lines if len(line) > columns]
    assert [line[:5] for line in wide] == ["start"]  # whole, to be copied
    assert max(map(len, lines[:-1])) > columns - 12


def test_the_longest_row_of_each_card_is_planned_with_the_host_it_takes(capsys):
    text = flat(said(capsys, "r1_8b_scam", "execution.engine=fused", "memory.profile=min"))
    rows = text[text.index("rows the longest that trains") :]
    assert "memory.host_gib=auto: 56 GiB a rank of a host that is not here" in rows
    found = re.search(r"4090 ([\d,]+) (\d+\.\d) inputs alone of the others on the host", rows)
    assert found is not None
    tokens, host = int(found[1].replace(",", "")), float(found[2])
    assert 150_000 < tokens < 300_000 and 40 < host <= 56
    speeds = re.search(r"4090 ([\d,]+) ([\d,]+) ([\d,]+) ([\d,]+) A100-40", rows)
    assert speeds is not None
    falling = [int(one.replace(",", "")) for one in speeds.groups()]
    assert falling == sorted(falling, reverse=True) and 100 < falling[-1] < falling[0] < 4000
    assert "the model has 131,072 positions" in rows
    less = flat(said(capsys, "r1_8b_scam", "execution.engine=fused", "memory.host_gib=8"))
    fewer = re.search(r"4090 ([\d,]+) (\d+\.\d)", less[less.index("rows the longest") :])
    assert fewer is not None and int(fewer[1].replace(",", "")) < tokens / 2
    assert "the longest that trains" not in flat(
        said(capsys, "r1_8b_scam", "execution.engine=peft")
    )


def test_speeds_of_a_small_model_stand_apart(capsys, tiny_llama):
    """Above a million tokens/s a figure is as wide as its column was."""
    out = said(capsys, f"model.id={tiny_llama}", "data.source=scam", "--rows", "40")
    table = out.split("predicted tokens/s of such rows")[1].split("time ")[0].splitlines()[2:]
    rows = [line.split() for line in table if line.strip()]
    assert any("1,1" in word for row in rows for word in row), rows
    assert all(len(row) == 5 for row in rows), rows


def test_the_last_line_can_be_pasted_where_a_name_has_spaces(capsys):
    words = ["r1_8b_scam", "data.system=be brief, $HOME"]
    start = said(capsys, *words).splitlines()[-1]
    assert shlex.split(start)[-2:] == words


def test_positions_are_named_where_a_card_goes_beyond_them(capsys, tiny_llama, tmp_path):
    """They are the config's; a model whose config is not known has none."""
    words = ["execution.engine=fused", "data.template=chat"]
    known = flat(said(capsys, "r1_8b_scam", f"model.id={tiny_llama}", *words))
    positions = json.loads((Path(tiny_llama) / "config.json").read_text())[
        "max_position_embeddings"
    ]
    assert f"the model has {positions:,} positions" in known
    assert "positions" not in flat(said(capsys, "r1_8b_scam", "model.id=random:llama-8b", *words))


@pytest.mark.parametrize("layout", ["packed", "split"])
def test_a_cure_is_no_pass_that_the_config_refuses(layout, capsys):
    words = ("model.id=random:llama-8b", f"execution.layout={layout}", "data.max_tokens=300000")
    cards = as_json(capsys, *words, "--ranks", "2", "--rows", "40")["cards"]
    cures = {one["cure"] for one in cards if one["cure"]}
    assert cures or layout == "packed"
    for cure in cures:
        as_json(capsys, *words, "--ranks", "2", "--rows", "40", *cure.split())
