"""The contract's comparisons, line by line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glassloop.plan.contract import SCHEMA, Contract, ContractBroken, check_same_rows
from glassloop.plan.steps import make_plan

STEP = make_plan(
    rows=21,
    size=2,
    ranks=2,
    accumulation=2,
    tail="keep",
    updates=3,
    epochs=1,
    warmup=1,
    peak=1e-2,
    kind="linear",
    first="peak_over_warmup",
)
FACTS = {"processes": 2, "mixed precision": "bf16", "dtype of adapters": "float32"}
CONTRACT = Contract(STEP, (8, 8, 5), (100, 90, 40), (300, 290, 140), "abc", FACTS)


def counted(**changes):
    return {"rows": 8, "supervised_tokens": 90, "real_tokens": 290, "lr": STEP.lr[1]} | changes


def test_an_update_as_planned_passes():
    CONTRACT.check_update(2, **counted())


@pytest.mark.parametrize(
    "change", [{"rows": 7}, {"supervised_tokens": 91}, {"real_tokens": 0}, {"lr": STEP.lr[1] * 2}]
)
def test_each_number_of_an_update_is_compared_and_both_are_named(change):
    (name, value), *_ = change.items()
    planned = counted()[name]
    with pytest.raises(
        ContractBroken,
        match=rf"update 2: planned {planned!r} {name.replace('_', ' ')}, counted {value!r};",
    ):
        CONTRACT.check_update(2, **counted(**change))


@pytest.mark.parametrize("name", FACTS)
def test_each_fact_is_compared_and_both_values_are_named(name):
    CONTRACT.check_facts(dict(FACTS))
    with pytest.raises(ContractBroken, match=f"{name}: planned {FACTS[name]}, found other"):
        CONTRACT.check_facts(FACTS | {name: "other"})


def test_the_message_blames_a_launcher_only_for_what_a_launcher_sets():
    contract = replace(CONTRACT, facts={"mixed precision": "bf16", "trainable parameters": 5})
    found = {"mixed precision": "no", "trainable parameters": 6}
    with pytest.raises(ContractBroken, match=r"an Accelerate config file set mixed precision; gla"):
        contract.check_facts(found)
    with pytest.raises(ContractBroken, match=r"parameters: planned 5, found 6\): please report it"):
        contract.check_facts(found | {"mixed precision": "bf16"})


def test_plan_json_has_every_line_and_other_rows_are_refused():
    plan = CONTRACT.as_dict()
    assert plan["schema"] == SCHEMA
    assert plan["by_update"] == {
        "rows": [8, 8, 5],
        "supervised_tokens": [100, 90, 40],
        "real_tokens": [300, 290, 140],
    }
    assert plan["contract"] == FACTS
    assert plan["lr"] == STEP.lr
    check_same_rows(plan, "abc", "plan.json")
    check_same_rows(
        {"schema": 1}, "abc", "plan.json"
    )  # of an older glassloop, which kept no digest
    with pytest.raises(ValueError, match="has abc, now they are def"):
        check_same_rows(plan, "def", "plan.json")
