"""What a plan says in words, plots and tables."""

from __future__ import annotations

from glassloop.plan.render import epoch_sentence, plot, shown_updates, wrapped
from glassloop.plan.render_cost import duration
from glassloop.plan.steps import make_plan


def test_the_epoch_sentence_knows_every_kind_of_tail():
    usual = dict(
        size=2,
        ranks=2,
        accumulation=4,
        updates=60,
        epochs=1.0,
        warmup=5,
        peak=1.0,
        kind="linear",
        first="zero",
    )
    assert "no tail" in epoch_sentence(make_plan(rows=32, tail="keep", **usual))
    assert "leaves 8 rows of each epoch out" in epoch_sentence(
        make_plan(rows=600, tail="drop", **usual)
    )


def test_the_plot_shows_every_learning_rate_in_80_columns():
    lines = plot([0.0, 0.5, 1.0])
    assert [line.split("|")[1] for line in lines[:-1]] == ["  *"] * 4 + [" **"] * 4
    assert max(map(len, plot([1.0 + i for i in range(1000)]))) <= 100
    assert all("*" not in line for line in plot([0.0, 0.0]))


def test_one_of_a_thing_is_not_several():
    usual = dict(size=2, ranks=2, tail="keep", updates=None, epochs=1.0, warmup=0)
    usual |= dict(peak=1.0, kind="linear", first="zero")
    short = epoch_sentence(make_plan(rows=2, accumulation=4, **usual))
    assert "0 full windows and a tail of 2 rows = 1 update an epoch" in short
    longer = epoch_sentence(make_plan(rows=9, accumulation=2, **usual))
    assert "1 full window and a tail of 1 row = 2 updates an epoch" in longer
    assert "would leave 1 row out" in longer
    assert plot([2e-4])[-1].split() == ["update", "+1"]


def test_the_table_shows_the_ends_and_the_peak():
    for updates, peak in ((60, 5), (1, 1), (7, 7), (3000, 100)):
        shown = shown_updates(updates, peak)
        assert {1, peak, updates} <= set(shown) and shown == sorted(set(shown)) and len(shown) <= 20


def test_long_lines_are_broken_below_their_text():
    lines = wrapped("name      " + "word " * 40)
    assert all(len(line) <= 100 for line in lines) and lines[1].startswith(" " * 12 + "word")
    assert [duration(35), duration(600), duration(36000)] == ["35 s", "10 min", "10.0 h"]
