"""Step arithmetic and learning rate: closed forms, and counts against brute force."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassloop.data.batches import Batches
from glassloop.data.rows import Row
from glassloop.plan.steps import describe, lr_at, make_plan

RECIPE = dict(tail="keep", epochs=1.0, warmup=5, peak=2e-4, kind="linear", first="peak_over_warmup")


def test_the_recipe_makes_38_windows_and_1_58_epochs():
    plan = make_plan(rows=600, size=2, ranks=2, accumulation=4, updates=60, **RECIPE)
    assert (plan.full_windows, plan.tail_rows, plan.windows_per_epoch) == (37, 8, 38)
    assert round(plan.epochs, 2) == 1.58
    assert "37 full windows and one of 8 rows" in describe(plan)[1]


def test_the_recipes_learning_rate_follows_the_formula_and_is_never_zero():
    U, W = 60, 5
    lr = [
        lr_at(u, updates=U, warmup=W, peak=2e-4, kind="linear", first="peak_over_warmup")
        for u in range(1, U + 1)
    ]
    assert lr == pytest.approx(
        [2e-4 * min(u / W, (U - u + 1) / (U - W + 1)) for u in range(1, U + 1)], rel=1e-12
    )
    assert max(lr) == lr[W - 1] == 2e-4
    assert min(lr) > 0


def test_first_zero_is_the_trainers_schedule():
    U, W = 60, 5
    lr = [
        lr_at(u, updates=U, warmup=W, peak=2e-4, kind="linear", first="zero")
        for u in range(1, U + 1)
    ]
    trainer = [2e-4 * (s / W if s < W else (U - s) / (U - W)) for s in range(U)]
    assert lr == pytest.approx(trainer, rel=1e-12)
    assert lr[0] == 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@given(updates=st.integers(1, 200), warmup=st.integers(0, 200))
def test_every_schedule_peaks_once_and_stays_positive(kind, updates, warmup):
    if warmup > updates:
        return
    lr = [
        lr_at(u, updates=updates, warmup=warmup, peak=1.0, kind=kind, first="peak_over_warmup")
        for u in range(1, updates + 1)
    ]
    assert all(0 < value <= 1 for value in lr)
    rising = lr[: max(warmup, 1)]
    assert rising == sorted(rising)
    falling = lr[max(warmup - 1, 0) :]
    assert falling == sorted(falling, reverse=True)
    if warmup:
        assert lr[warmup - 1] == 1.0


@given(
    rows=st.integers(1, 500),
    size=st.integers(1, 5),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 5),
    tail=st.sampled_from(["keep", "drop"]),
    epochs=st.sampled_from([0.5, 1.0, 1.5, 3.0]),
)
def test_windows_and_updates_equal_a_count(rows, size, ranks, accumulation, tail, epochs):
    per_update = size * ranks * accumulation
    windows = [min(per_update, rows - start) for start in range(0, rows, per_update)]
    if tail == "drop":
        windows = [window for window in windows if window == per_update]
    make = lambda: make_plan(  # noqa: E731
        rows=rows,
        size=size,
        ranks=ranks,
        accumulation=accumulation,
        updates=None,
        **(RECIPE | {"tail": tail, "epochs": epochs, "warmup": 0}),
    )
    if not windows:
        with pytest.raises(ValueError, match="make no window"):
            make()
        return
    plan = make()
    assert plan.windows_per_epoch == len(windows)
    assert plan.updates == max(1, math.ceil(epochs * len(windows)))


def test_updates_outside_the_run_have_no_learning_rate():
    with pytest.raises(ValueError, match=r"not one of 1 \.\. 60"):
        lr_at(61, updates=60, warmup=5, peak=1.0, kind="linear", first="zero")


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule.warmup_updates = 5 is more than the 1 updates"):
        make_plan(rows=8, size=2, ranks=2, accumulation=2, updates=None, **RECIPE)


@given(
    rows=st.integers(1, 120),
    size=st.integers(1, 4),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    tail=st.sampled_from(["keep", "drop"]),
    updates=st.integers(1, 40),
    layout=st.sampled_from(["literal", "packed"]),
    seed=st.integers(0, 3),
)
def test_the_plan_equals_a_count_of_the_rows_that_every_rank_gets(
    rows, size, ranks, accumulation, tail, updates, layout, seed
):
    """Windows, totals and repeats of the plan are those of the batches.

    Row by row, rank by rank, pass by pass.
    """
    if tail == "drop" and rows < size * ranks * accumulation:
        return
    shape = RECIPE | {"tail": tail, "warmup": 0}
    plan = make_plan(
        rows=rows, size=size, ranks=ranks, accumulation=accumulation, updates=updates, **shape
    )
    made = tuple(
        Row(f"row:{i}", tuple(range(2 + i % 7)), (False,) + (True,) * (1 + i % 7))
        for i in range(rows)
    )
    batches = Batches(rows=made, plan=plan, seed=seed, layout=layout, pass_tokens=40)
    seen: Counter[int] = Counter()
    of_epoch: dict[int, Counter[int]] = {}
    for u in range(1, updates + 1):
        window = batches.window(u)
        computed = Counter(row for rank in window.passes for one in rank for row in one)
        assert computed == Counter(window.rows)  # every row of the window once, on one rank
        is_full = (u - 1) % plan.windows_per_epoch < plan.full_windows
        assert len(window.rows) == (plan.rows_per_update if is_full else plan.tail_rows)
        if layout == "literal":
            assert all(len(rank) <= accumulation for rank in window.passes)
            assert all(len(one) <= size for rank in window.passes for one in rank)
        seen += computed
        of_epoch.setdefault(window.epoch, Counter()).update(computed)
    assert seen.total() == plan.rows_trained
    assert all(max(epoch.values()) == 1 for epoch in of_epoch.values())  # nothing twice in an epoch
    assert len(of_epoch) == math.ceil(plan.epochs)
    times = Counter(seen[row] for row in range(rows))
    if plan.times_trained is None:
        assert tail == "drop" and plan.tail_rows
    else:
        assert dict(times) == plan.times_trained


def test_the_recipes_60_updates_train_on_352_rows_twice():
    plan = make_plan(rows=600, size=2, ranks=2, accumulation=4, updates=60, **RECIPE)
    assert (plan.rows_per_update, plan.full_windows, plan.tail_rows) == (16, 37, 8)
    assert plan.rows_trained == 952
    assert plan.times_trained == {2: 352, 1: 248}


def test_one_of_a_kind_has_no_plural():
    plan = make_plan(rows=9, size=1, ranks=1, accumulation=1, updates=1, **(RECIPE | {"warmup": 1}))
    assert describe(plan)[:2] == [
        "1 row x 1 rank x 1 micro-batch = 1 row an update",
        "9 rows make 9 updates an epoch (9 full windows)",
    ]
    plan = make_plan(
        rows=9, size=2, ranks=2, accumulation=2, updates=None, **(RECIPE | {"warmup": 1})
    )
    assert describe(plan)[0] == "2 rows x 2 ranks x 2 micro-batches = 8 rows an update"
    assert "1 full window and one of 1 row)" in describe(plan)[1]
