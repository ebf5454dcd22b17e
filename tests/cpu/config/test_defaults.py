"""Defaults belong to nobody's recipe, presets keep theirs, and one length beats another."""

from __future__ import annotations

from pathlib import Path

import pytest

from glassloop.config import Config, settled
from glassloop.config.arguments import ConfigError, parse
from glassloop.plan.outlook import plan_of


def test_a_run_without_a_preset_is_one_epoch_with_its_own_template_and_no_tracker() -> None:
    config = parse(["data.source=mine.csv"])
    assert (config.schedule.updates, config.schedule.epochs) == (None, 1)
    assert (config.schedule.warmup_updates, config.data.template) == (None, "auto")
    assert (config.data.rows, config.tracking.to) == (None, ())
    plan = plan_of(config, 400, 1)  # 8 rows an update
    assert (plan.updates, plan.warmup) == (50, 3)


@pytest.mark.parametrize("preset", ["r1_8b_scam", "r1_8b_medical", "r1_8b_notebook"])
def test_presets_keep_the_recipe(preset: str) -> None:
    config = parse([preset])
    assert (config.schedule.updates, config.schedule.warmup_updates) == (60, 5)
    assert config.tracking.to == ("wandb",)
    assert config.data.template == ("instruct" if preset == "r1_8b_notebook" else "r1")


@pytest.mark.parametrize(
    ("words", "updates", "warmup"),
    [
        (["schedule.epochs=3"], 114, 5),  # beats the preset's 60 updates: 600 rows, 16 an update
        (["schedule.updates=3"], 3, 1),  # works alone: the recipe's warmup of 5 would outlast it
        (["schedule.updates=3", "schedule.warmup_updates=2"], 3, 2),
        (["schedule.updates=6"], 6, 5),
        (["schedule.updates=null"], 38, 5),
        (
            ["schedule.epochs=1", "schedule.warmup_updates=null", "schedule.warmup_share=0.5"],
            38,
            19,
        ),
    ],
)
def test_a_length_on_the_command_line_beats_the_presets(
    words: list[str], updates: int, warmup: int
) -> None:
    plan = plan_of(parse(["r1_8b_scam", *words]), 600, 2)
    assert (plan.updates, plan.warmup) == (updates, warmup)
    assert max(plan.lr) == pytest.approx(2e-4)
    assert plan.lr.index(max(plan.lr)) == warmup - 1


def test_a_files_epochs_beat_the_presets_updates(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("schedule: {epochs: 2}\n")
    assert parse(["r1_8b_scam", "--config", str(file)]).schedule.updates is None
    config = parse(["r1_8b_scam", "--config", str(file), "schedule.updates=9"])
    assert (config.schedule.updates, config.schedule.epochs) == (9, 1)


def test_two_lengths_on_one_command_line_are_refused() -> None:
    with pytest.raises(ConfigError, match="both say how long the run is: keep one"):
        parse(["schedule.updates=9", "schedule.epochs=3"])


def test_a_warmup_by_share_never_outlasts_the_run() -> None:
    for updates in (1, 2, 3, 19, 20, 21, 1000):
        config = parse([f"schedule.updates={updates}"])
        plan = plan_of(config, 64, 1)
        assert 1 <= plan.warmup <= updates
        assert max(plan.lr) == pytest.approx(config.optimizer.lr)
    assert plan_of(parse(["schedule.warmup_share=0"]), 64, 1).warmup == 0


def test_a_given_warmup_longer_than_the_run_names_the_cure() -> None:
    with pytest.raises(ValueError, match="or set it to null"):
        plan_of(parse(["schedule.warmup_updates=9"]), 64, 1)


def test_a_settled_config_names_what_was_left_open() -> None:
    config = settled(Config(), template="chat", warmup_updates=4)
    assert (config.data.template, config.schedule.warmup_updates) == ("chat", 4)
    assert settled(config, template="chat", warmup_updates=4) == config
