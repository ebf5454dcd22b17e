"""A card in one line, and its predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_lines import line

from glassloop.bench import card, cards_page
from glassloop.bench.processes import Place
from glassloop.cli import bench as bench_command


def test_card_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="--card measures a GPU, and torch sees none here"):
        card.card_spec(Place("cpu", 0), 1)
    with pytest.raises(ValueError, match="torch sees 1 GPU here"):
        card.card_spec(Place("cuda", 1), 2)
    assert card.card_spec(Place("cuda", 2), 2).rows_per_update == 16


def test_the_card_line_says_on_what_and_how_fast() -> None:
    one = line(2000.0, ranks=2, workload="full-v1")
    state = {
        "power_limit_w": 350.0,
        "pcie_generation": 4,
        "pcie_generation_max": 4,
        "pcie_width": 8,
    }
    during = {"sm_mhz": 1695, "sm_mhz_lowest": 1500, "memory_mhz": 9501, "throttle": ["power cap"]}
    one["card"] = {"before": state, "during": during, "after": state, "p2p": False}
    told = card.card_line(one)
    assert "\n" not in told and told.startswith(
        "card-v1 | 2 x NVIDIA GeForce RTX 3090 | 350 W | SM 1695 MHz (lowest 1500)"
    )
    for part in (
        "throttle: power cap",
        "gen4 (max 4) x8",
        "P2P no",
        "driver 570.10",
        "torch 2.11.0",
        "012345678",
        "1,000 tokens/s per GPU",
        "7.50 GiB",
    ):
        assert part in told
    assert "4.000 J/token" in card.card_line(one | {"energy": {"tokens_per_joule": 0.25}})
    bare = line(2000.0, gpus=1) | {"energy": None}
    assert "? J/token" in card.card_line(bare)
    assert "throttle: unknown" in card.card_line(bare) and "? W" in card.card_line(bare)


def test_the_card_lines_loss_is_compared_with_the_recorded_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = line(2000.0, loss=11.7)
    assert card.loss_verdict(one, None) == "nothing to compare with"
    assert card.loss_verdict(one, 11.71) == "as expected"
    assert card.loss_verdict(one, 11.75).startswith("DIFFERS from 11.7500: do not trust")
    assert card.loss_verdict(line(loss=float("nan")), 11.7).startswith("DIFFERS")
    assert card.loss_verdict(line(loss=11.7, ranks=2), 12.0) == "nothing to compare with"
    assert f"loss 11.7000 ({card.loss_verdict(one)})" in card.card_line(one)
    wrong = line(9000.0, gpus=1) | {
        "card_name": "card-v1",
        "check": {"within": None, "why": "its loss DIFFERS"},
    }
    assert card.measured_cards([wrong]) == {}


def test_cards_that_were_never_measured_are_labelled() -> None:
    measured = card.measured_cards(
        [line(1300.0, gpus=1) | {"card_name": "card-v1"}, line(9999.0, gpus=1)]
    )
    assert measured == {"3090": 1300.0}
    rows = card.predictions(measured)
    assert any(row.startswith("| 3090 | 1,300 | measured") for row in rows)
    assert all(
        "PREDICTED" in row for row in rows[2 : rows.index("")] if not row.startswith("| 3090 ")
    )


def test_the_fused_engine_is_predicted_by_card_and_memory_profile() -> None:
    rows = card.predictions({})
    title, _, _, _, *lines = rows[rows.index("") + 1 :]
    assert "execution.engine=fused, PREDICTED" in title
    cells = {
        tuple(line.split(" | ")[:2]): [cell.strip(" |") for cell in line.split(" | ")[2:]]
        for line in lines
    }
    assert len(cells) == 12
    layers, gib, speed = cells["| 4090", "fill"]
    least, least_gib, slower = cells["| 4090", "min"]
    assert layers.startswith("32, ") and least == "1, 0"
    assert float(gib) > 20 and float(least_gib) < 8
    assert float(speed.replace(",", "")) > 1.2 * float(slower.replace(",", ""))
    # of the reference engine on the same rows
    reference = next(row for row in rows if row.startswith("| 4090 | ")).split(" | ")[1]
    assert float(slower.replace(",", "")) > float(reference.replace(",", ""))


def test_the_page_draws_every_card_measured_or_predicted() -> None:
    """One row a card; the best comparable line counts, and a label is never a number."""
    measured = [
        line(rate, gpus=1) | {"card_name": "card-v1", "energy": {"tokens_per_joule": 4.0}}
        for rate in (1300.0, 1250.0)
    ]
    other = line(9999.0, gpus=1)  # another piece of work
    rows = cards_page.card_rows([*measured, other])
    assert [row.card for row in rows if row.measured is not None] == ["3090"]
    assert (rows[0].measured, rows[0].joules, rows[0].lines) == (1300.0, 0.25, 2)
    assert {row.card for row in rows} == set(card.predicted())
    page = cards_page.cards_page([*measured, other])
    assert page.count("not measured") == len(rows) - 1 and "9,999" not in page
    assert page.count('class="bar measured"') == 1 and "<script" not in page
    assert page.count('class="bar predicted"') == len(rows)
    nothing = cards_page.cards_page([])
    assert nothing.count("not measured") == len(rows)


def test_predict_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cards.html"
    assert bench_command.main(["--predict", "--page", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    assert "<title>card-v1 by card</title>" in file.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"--page \S+ goes with --predict"):
        bench_command.main(["--page", str(file)])
