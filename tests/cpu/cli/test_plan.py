"""`glassloop plan`: the recipe's numbers, its lightness, its refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planned import as_json, flat, said

from glassloop.cli import plan as command
from glassloop.cli.plan import main
from glassloop.config import DataConfig
from glassloop.data.counting import count_rows
from glassloop.plan.outlook import plan_of
from glassloop.predict.hardware import PLANNED_FOR, Present
from glassloop.predict.shapes import KNOWN
from glassloop.predict.time_checks import CHECKED, errors

ROOT = Path(__file__).resolve().parents[3]
R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
pytestmark = pytest.mark.usefixtures("no_cards")


def test_the_recipe_in_words(capsys):
    out = said(capsys, "r1_8b_scam")
    text = flat(out)
    assert "asked 2 x 2 x 4 (rows x ranks x micro-batches) = 16 rows an update" in text
    assert "executed literal: 4 passes of 2 rows on each of 2 ranks" in text
    assert "600 / 16 = 37.5: 37 full windows and a tail of 8 rows = 38 updates an epoch" in text
    assert "rounding down to 37 would leave 8 rows out" in text
    assert "60 updates = 1.58 epochs" in text
    assert "952 rows trained on in all: 352 rows twice, 248 rows once" in text
    assert "trains 41,943,040 parameters" in text
    assert "1: 4.000e-05" in text and "5: 2.000e-04" in text and "60: 3.571e-06" in text
    assert "predicted, not measured" in text
    for card in ("3090", "4090", "A100-40", "A100-80", "H100", "H200"):
        assert f"{card} " in text
    assert out.splitlines()[-1] == (
        "start     accelerate launch --config_file accelerate_configs/ddp_2gpu.yaml train_loop.py "
        "r1_8b_scam"
    )
    assert max(map(len, out.splitlines()[:-1])) <= 100


def test_no_heavy_package_is_imported():
    code = (
        "import sys\nfrom glassloop.cli.plan import main\nassert main(['r1_8b_scam', '--compare', "
        "'batch.size=4']) == 0\nheavy = {'torch', 'transformers', 'datasets', 'numpy', "
        "'accelerate', 'peft'} & set(sys.modules)\nassert not heavy, heavy"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_json_holds_the_plan_with_every_learning_rate(capsys):
    found = as_json(capsys, "r1_8b_scam", "--ranks", "1", "execution.engine=peft")
    plan = found["plan"]
    assert (
        plan["rows_per_update"],
        plan["ranks"],
        plan["accumulation"],
        plan["windows_per_epoch"],
    ) == (16, 1, 8, 38)
    assert len(plan["lr"]) == 60 and plan["lr"][4] == 2e-4
    assert found["trainable_parameters"] == 41_943_040
    assert found["memory_bytes"]["peak"] == max(found["memory_bytes"].values())
    assert found["memory_bytes_other_base"]["load"] > 2 * found["memory_bytes"]["load"]
    assert [card["card"] for card in found["cards"]] == list(PLANNED_FOR)
    assert all(card["least_gib"] <= card["needed_gib"] for card in found["cards"])
    assert found["times_trained"] == {"1": 248, "2": 352}


def test_fewer_ranks_with_fixed_rows_change_nothing_in_the_math(capsys):
    (change,) = as_json(capsys, "r1_8b_scam", "--compare", "ranks=1")["compare"]
    assert change["math"] == [] and change["cure"] is None
    assert "passes a rank and update: 4 -> 8" in change["execution"]


def test_fewer_ranks_with_fixed_accumulation_name_the_one_field_that_keeps_the_rows(capsys):
    words = ("r1_8b_scam", "batch.accumulation=4", "--ranks", "2")
    (change,) = as_json(capsys, *words, "--compare", "ranks=1")["compare"]
    assert "rows an update: 16 -> 8" in change["math"]
    assert change["cure"] == "batch.rows_per_update=16"
    # and that field does keep them
    (kept,) = as_json(capsys, *words, "--compare", "ranks=1 batch.rows_per_update=16")["compare"]
    assert kept["math"] == []
    assert "Keep the rows of an update with batch.rows_per_update=16" in flat(
        said(capsys, *words, "--compare", "ranks=1")
    )


def test_a_variation_that_cannot_be_carried_out_says_why(capsys):
    (change,) = as_json(capsys, "r1_8b_scam", "--compare", "ranks=3")["compare"]
    assert "batch.rows_per_update = 16 is not a multiple" in change["refused"]
    assert "is impossible: " in said(capsys, "r1_8b_scam", "--compare", "ranks=3")


def test_a_later_lr_is_named(capsys):
    (change,) = as_json(capsys, "r1_8b_scam", "--compare", "schedule.warmup_updates=10")["compare"]
    assert change["math"] == ["lr: from update 1 on (4e-05 -> 2e-05)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.source=owner/name"], "how many rows there are is not known"),
        (["r1_8b_scam", "--ranks", "3"], "batch.rows_per_update = 16 is not a multiple"),
        (["r1_8b_scam", "--hardware", "2x3090", "--ranks", "4"], "--ranks 4, but batch.ranks = 2"),
        (["r1_8b_scam", "--ranks", "4", "--machines", "3"], "does not spread over --machines 3"),
        (["r1_8b_scam", "--rows", "8", "batch.tail=drop"], "make no window"),
        (["r1_8b_scam", "batch.sice=2"], "did you mean batch.size"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        main(words)


def test_machines_share_the_ranks_and_stand_in_the_command(capsys):
    text = flat(said(capsys, "r1_8b_scam", "--ranks", "4", "--machines", "2"))
    assert "2 on each of 2 machines" in text
    assert "--num_processes 4 --num_machines 2 --machine_rank R" in text


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["r1_8b_scam", "--ranks", "1"], "accelerate_configs/single_gpu.yaml train_loop.py"),
        (["r1_8b_scam", "--ranks", "2"], "accelerate_configs/ddp_2gpu.yaml train_loop.py"),
        (
            ["r1_8b_scam", "--ranks", "8"],
            "accelerate_configs/ddp_2gpu.yaml --num_processes 8 train_loop.py",
        ),
        (["smollm2_demo"], "accelerate_configs/cpu_2proc.yaml train_loop.py smollm2_demo"),
        (
            ["smollm2_demo", "--ranks", "4", "batch.size=1"],
            "accelerate_configs/cpu_2proc.yaml --num_processes 4 train_loop.py",
        ),
    ],
)
def test_the_last_line_starts_what_was_planned(capsys, words, start):
    assert start in said(capsys, *words).splitlines()[-1]


def test_ranks_are_those_of_the_config_else_of_the_machine(capsys, monkeypatch):
    assert as_json(capsys, "r1_8b_scam", "--hardware", "2x3090")["notes"] == []
    card = Present("NVIDIA GeForce RTX 4090", 23.99, 3.0, "580.1", (8, 9))
    odd = Present("NVIDIA Something New", 100.0, 90.0, "580.1", (13, 0))
    monkeypatch.setattr(command, "NVIDIA", str(ROOT))
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: (card, card, odd, odd))
    found = as_json(capsys, "r1_8b_scam")
    assert found["plan"]["ranks"] == 4
    judged = [one for one in found["cards"] if one["has_gib"] == 3.0]  # by what is free
    assert len(judged) == 2 and not any(one["fits"] for one in judged)
    assert "NVIDIA Something New: not in the table of cards" in " ".join(found["unknown"])


def test_rows_are_counted_without_loading_them(tmp_path):
    lines = [json.dumps({"question": f"q{i}", "response": "a\nb"}) for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "rows.json").write_text("[" + ",".join(lines) + "]")
    (tmp_path / "rows.csv").write_text(
        "question,response\n" + "".join(f'q{i},"a\nb, c"\n' for i in range(7))
    )
    for kind in ("jsonl", "json", "csv"):
        assert count_rows(DataConfig(source=str(tmp_path / f"rows.{kind}"))).rows == 7, kind
    assert count_rows(DataConfig(source=str(tmp_path / "rows.csv"), heldout=0.3)).rows == 5
    assert count_rows(DataConfig(source="sample", heldout=0.2)).rows == 77
    assert count_rows(DataConfig(rows=5)).rows == 5
    assert count_rows(DataConfig(rows=5), given=9).rows == 9
    unknown = count_rows(DataConfig(source="owner/name"))
    assert unknown.rows is None and "--rows N" in unknown.how
    with pytest.raises(ValueError, match="there is no such file"):
        count_rows(DataConfig(source=str(tmp_path / "none.csv")))
    (tmp_path / "bad.json").write_text("[{")
    with pytest.raises(ValueError, match=r"bad\.json, line 1: Expecting property name"):
        count_rows(DataConfig(source=str(tmp_path / "bad.json")))
    assert count_rows(DataConfig(source=f"{tmp_path}/rows.*")).rows == 21
    mix = [{"source": f"{tmp_path}/rows.csv", "weight": 2}, {"source": "sample", "rows": 9}]
    assert count_rows(DataConfig(mix=mix)).rows == 23  # type: ignore[arg-type]
    assert count_rows(DataConfig(mix=[*mix, {"source": "owner/name"}])).rows is None  # type: ignore[list-item]


def test_a_mix_is_counted_by_source_and_update(capsys, tiny_llama, tmp_path):
    from launching import write_rows

    one, two = (write_rows(tmp_path / f"{name}.jsonl", 8) for name in "ab")
    words = [
        f"model.id={tiny_llama}",
        f"data.mix=[{{source: {one}, weight: 2}}, {{source: {two}}}]",
        "data.template=chat",
        "schedule.updates=6",
        "batch.accumulation=2",
    ]
    text = flat(said(capsys, *words, "--ranks", "2", "--with-data"))
    assert "a.jsonl: 16 rows an epoch (weight 2)" in text
    assert re.search(r"b\.jsonl: 16 rows in all updates, \d to \d an update \(mean 2\.7\)", text)


def test_with_data_counts_tokens_as_the_run_will(capsys, tiny_llama, tmp_path):
    from launching import write_rows

    from glassloop.base.tokenizer import load_tokenizer
    from glassloop.config.arguments import parse
    from glassloop.data.batches import Batches
    from glassloop.data.dataset import build_rows
    from glassloop.data.sources import load_examples
    from glassloop.data.templates import make_template

    rows = write_rows(tmp_path / "rows.jsonl", 37)
    words = [
        f"model.id={tiny_llama}",
        f"data.source={rows}",
        "data.template=chat",
        "data.max_tokens=96",
        "batch.accumulation=2",
    ]
    words += ["schedule.updates=12", "execution.layout=packed"]
    found = as_json(capsys, *words, "--ranks", "2", "--with-data")
    tokens, plan = found["tokens"], found["plan"]
    config = parse(words)
    loaded = load_examples(config.data, config.seed)
    template = make_template(config.data, load_tokenizer(config.model), loaded.train)
    made = build_rows(loaded, template, config.data).train.rows
    steps = plan_of(config, len(made), 2)
    assert steps.as_dict() == plan | {"lr": steps.lr}
    batches = Batches(rows=made, plan=steps, seed=config.seed, layout="literal", pass_tokens=192)
    windows = [batches.window(u) for u in range(1, 13)]
    packed = replace(batches, layout="packed")
    passes = [
        [made[row] for row in one] for window in windows for rank in window.passes for one in rank
    ]
    assert tokens["real"] == sum(len(row) for one in passes for row in one)
    assert tokens["supervised"] == sum(row.supervised_tokens for one in passes for row in one)
    assert tokens["literal_slots"] == sum(len(one) * max(map(len, one)) for one in passes)
    assert tokens["literal_passes"] == len(passes)
    assert tokens["packed_slots"] == tokens["real"]
    assert tokens["padding_share"] == pytest.approx(1 - tokens["real"] / tokens["literal_slots"])
    assert tokens["packed_passes"] < tokens["literal_passes"]
    assert tokens["heaviest_rows"] == 1 and tokens["heaviest_tokens"] <= 192
    shares = [
        sum(len(row) for one in rank for row in (made[i] for i in one))
        for u in range(1, 13)
        for rank in packed.window(u).passes
    ]
    assert tokens["heaviest_share"] == max(shares)
    assert f"{tokens['literal_slots']:,} places in {len(passes)} passes" in said(
        capsys, *words, "--ranks", "2", "--with-data"
    )


def test_with_data_packs_as_the_fused_engine_does_on_a_card(capsys, tiny_llama, tmp_path):
    from launching import write_rows

    words = [
        f"model.id={tiny_llama}",
        f"data.source={write_rows(tmp_path / 'rows.jsonl', 37)}",
        "data.template=chat",
        "data.max_tokens=96",
    ]
    words += [
        "schedule.updates=4",
        "schedule.warmup_updates=1",
        "execution.layout=packed",
        "--ranks",
        "1",
        "--with-data",
    ]
    few, many = (
        as_json(capsys, *words, f"execution.engine={engine}")["tokens"]
        for engine in ("fused", "peft")
    )
    assert few["packed_passes"] == 4 < many["packed_passes"]  # a pass an update
    assert (
        few["heaviest_tokens"]
        == few["heaviest_share"]
        == many["heaviest_share"]
        > many["heaviest_tokens"]
    )


def test_a_checkpoints_size_is_that_of_one_that_was_written(capsys):
    written = 33_106_784  # bytes of a checkpoint of the demo
    assert as_json(capsys, "smollm2_demo")["checkpoint_bytes"] == pytest.approx(written, rel=0.1)


def test_predicted_speeds_are_near_what_was_measured():
    found = {check: error for check, _, error in errors()}
    assert list(found) == list(CHECKED)
    assert [round(error, 2) for error in found.values()] == pytest.approx(
        [0.15, -0.02, -0.17], abs=0.02
    )  # what a plan prints of them


def test_predicted_speeds_of_the_fused_engine_are_near_what_was_measured():
    assert all(-0.05 < error < 0.10 for _, _, error in errors("fused"))
    assert len(errors("fused")) == 9
