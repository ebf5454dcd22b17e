"""A study's file makes a grid, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from glassloop.study.spec import cells_of, read_study, rows_per_update

ROOT = Path(__file__).resolve().parents[3]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
GOOD = """
name: one
question: Does it?
base: batch.size=4 batch.accumulation=4 schedule.updates=12 schedule.warmup_updates=3
axes:
  lora.r: [8, 16]
  clip:
    clipped: {optimizer.max_grad_norm: 1.0}
    free: {optimizer.max_grad_norm: null}
seeds: [1, 2]
claims:
  - {says: r=8 underfits, quantity: heldout_loss, expect: higher,
     cell: {lora.r: 8}, against: {lora.r: 16}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "one.yaml"
    path.write_text(text)
    return path


def test_the_grid_is_every_combination_seeds_outermost(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, GOOD))
    cells = cells_of(study, tmp_path / "out")
    assert [cell.name for cell in cells] == [
        f"r{r}-{clip}-seed{seed}"
        for seed in (1, 2)
        for r in (8, 16)
        for clip in ("clipped", "free")
    ]
    last = cells[-1]
    assert (last.config.lora.r, last.config.seed, last.config.optimizer.max_grad_norm) == (
        16,
        2,
        None,
    )
    assert (
        last.config.run.dir == str(tmp_path / "out" / "cells") and last.config.run.name == last.name
    )
    assert (
        last.config.evaluation.generate_rows == 0 and last.config.checkpoint.every_updates is None
    )


def test_words_of_the_command_line_go_over_the_base_and_over_what_cells_leave_out(
    tmp_path: Path,
) -> None:
    study = read_study(
        written(tmp_path, GOOD),
        ["schedule.updates=7", "evaluation.generate_rows=2", "batch.rows_per_update=8"],
    )
    config = cells_of(study, tmp_path)[0].config
    assert (config.schedule.updates, config.evaluation.generate_rows, rows_per_update(config)) == (
        7,
        2,
        8,
    )


@pytest.mark.parametrize(
    ("size", "updates", "warmup"), [(1, 48, 12), (2, 24, 6), (4, 12, 3), (8, 6, 2)]
)
def test_equal_rows_are_more_updates_where_windows_are_smaller_and_warmup_keeps_its_share(
    tmp_path: Path, size: int, updates: int, warmup: int
) -> None:
    text = (
        GOOD.partition("axes:")[0] + "axes:\n  batch.accumulation: [1, 2, 4, 8]\nequal: rows_seen\n"
    )
    cells = {
        cell.settings["batch.accumulation"]: cell.config
        for cell in cells_of(read_study(written(tmp_path, text)), tmp_path)
    }
    config = cells[str(size)]
    assert (config.schedule.updates, config.schedule.warmup_updates) == (updates, warmup)
    assert (config.schedule.updates or 0) * rows_per_update(config) == 192


def test_equal_updates_leave_the_schedule_alone(tmp_path: Path) -> None:
    text = GOOD.partition("axes:")[0] + "axes:\n  batch.accumulation: [1, 8]\nequal: updates\n"
    configs = [cell.config for cell in cells_of(read_study(written(tmp_path, text)), tmp_path)]
    assert {(config.schedule.updates, config.schedule.warmup_updates) for config in configs} == {
        (12, 3)
    }


BASE, CLAIM = GOOD.partition("claims:")[0], "claims:\n  - "
SOUND = "says: x, quantity: heldout_loss, cell: {lora.r: 8}, against: {lora.r: 16}, expect: higher"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("axis: {}\n", ["axis =", "no field of a study", "did you mean axes"]),
        ("name: one\n", ["axes = None", "lora.r: [8, 16, 32]"]),
        ("axes: {lora.rank: [8]}\n", ["axes.lora.rank", "[8]", "no field of the config", "lora.r"]),
        ("axes: {lora.r: [8, 8]}\n", ["axes.lora.r", "stands there twice"]),
        (
            "axes: {rank: {r8: {lora.q: 8}}}\n",
            ["axes.rank.r8", "lora.q is no field", "did you mean lora.r"],
        ),
        ("axes: {lora.r: 8}\n", ["axes.lora.r = 8", "a list of values"]),
        ("axes: {lora.r: [0]}\n", ["cell r0-seed1", "lora.r = '0'", "greater than or equal to 1"]),
        (BASE + "seeds: [1, 1]\n", ["seeds = [1, 1]", "different whole numbers"]),
        (BASE + "parallel: 0\n", ["parallel = 0", "from 1 to"]),
        (BASE + "parallel: 3\nmeasure: [time]\n", ["parallel = 3", "leave `time` out of measure"]),
        (BASE + "measure: [speed]\n", ["measure = ['speed']", "loss, stability, memory, time"]),
        (BASE + "equal: rows\n", ["equal = 'rows'", "rows_seen, updates"]),
        (BASE + "critical: true\n", ["critical = True", "batch.accumulation"]),
        (BASE + "bisect: 3\n", ["bisect = 3", "true or false"]),
        (
            "base: schedule.steps=3\naxes: {lora.r: [8]}\n",
            ["base: ", "schedule.steps is not a field"],
        ),
        ("base: run.name=x\naxes: {lora.r: [8]}\n", ["base = 'run.name=x'", "leave it out"]),
        ("base: seed=3\naxes: {lora.r: [8]}\n", ["base = 'seed=3'", "seeds says which"]),
        (
            BASE + CLAIM + "{" + SOUND.replace("heldout_loss", "heldout") + "}",
            ["claims[1].quantity = 'heldout'", "heldout_loss"],
        ),
        (
            BASE + CLAIM + "{" + SOUND.replace("higher", "more") + "}",
            ["claims[1].expect = 'more'", "higher, lower, about"],
        ),
        (
            BASE + CLAIM + "{" + SOUND.replace("lora.r: 16", "lora.r: 64") + "}",
            ["claims[1].against.lora.r = 64", "there are 8, 16"],
        ),
        (
            BASE + CLAIM + "{" + SOUND.replace("lora.r: 16", "clip: free") + "}",
            ["claims[1].against", "name the axes that cell names"],
        ),
        (
            BASE + CLAIM + "{" + SOUND.replace("higher", "about") + "}",
            ["claims[1].expect = 'about'", "needs value"],
        ),
        (BASE + CLAIM + "{" + SOUND + ", by: 5e-4}", ["claims[1].by = '5e-4'", "write 5.0e-4"]),
        (BASE + CLAIM + "{" + SOUND + ", by: -1}", ["claims[1].by = -1", "0 or more"]),
        (
            BASE + CLAIM + "{" + SOUND + ", sides: 2}",
            ["claims[1].sides = 2", "no field of a claim"],
        ),
        ("name: [\n", ["is not readable YAML"]),
        ("- 1\n", ["expected fields such as `axes:`"]),
    ],
)
def test_a_bad_file_is_refused_with_file_field_value_and_cure(
    tmp_path: Path, text: str, named: list[str]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=str(path)) as error:
        cells_of(read_study(path), tmp_path)
    for words in named:
        assert words in str(error.value), str(error.value)


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    text = (
        "base: batch.size=4 batch.accumulation=4 schedule.updates=5\naxes: {batch.accumulation: "
        "[8]}\nequal: rows_seen\n"
    )
    with pytest.raises(ValueError, match="5 updates of 16 rows are no whole updates of 32 rows"):
        cells_of(read_study(written(tmp_path, text)), tmp_path)


def test_a_field_that_is_an_axis_is_refused_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"command line = 'lora.r=4': every cell has a value of its own: lora.r says which",
    ):
        read_study(written(tmp_path, BASE), ["lora.r=4"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_can_be_run_and_claim_something(
    path: Path, tmp_path: Path
) -> None:
    study = read_study(path)
    cells = cells_of(study, tmp_path)
    assert study.name == path.stem and study.question and study.cannot_say and study.claims
    assert len(study.seeds) > 1, "with one seed no claim is ever resolved"
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_word_of_base_may_be_quoted_for_its_spaces(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    text = "name: s\nquestion: q\naxes: {lora.r: [8]}\nseeds: [1]\nbase: "
    study.write_text(text + "schedule.updates=2 'model.id=my models/one'\n")
    assert "model.id=my models/one" in read_study(study).words
    study.write_text(text + """schedule.updates=2 model.id="my models\n""")
    with pytest.raises(ValueError, match=r"base.*words as a shell takes them"):
        read_study(study)
