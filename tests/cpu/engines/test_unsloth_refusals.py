"""What stands in the way of Unsloth is said before it is imported."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import ValidationError

from glassloop.config.arguments import from_values
from glassloop.engines import unsloth_checks as checks
from glassloop.plan.outlook import look_ahead, plan_of
from glassloop.plan.render import render

# --- refused before anything is imported

TRUE_LIMITS = {
    "unsloth": (
        'trl==0.1; extra == "colab"',
        "torch<2.15.0,>=2.4.0",
        "datasets!=4.0.*,!=4.1.0,<5.0.0,>=3.4.1",
        "transformers!=4.53.0,!=5.0.0,<=5.17.0,>=4.52.4",
        "trl!=0.19.0,<=1.15.0,>=0.18.2",
        "typer>=0.19.0",
        "unsloth_zoo>=2026.10.9",
        'triton>=3.0.0; "linux" in sys_platform',
    ),
    "unsloth-zoo": ("peft!=0.11.0,>=0.18.0",),
}
SOUND = {
    "unsloth": "2026.10.9",
    "unsloth-zoo": "2026.10.9",
    "torch": "2.11.0+cu130",
    "datasets": "4.7.0",
    "transformers": "5.17.0",
    "trl": "1.15.0",
    "triton": "3.6.0",
    "peft": "0.21.2",
}


def problems(*, on_cuda: bool = True, **versions: str | None) -> str:
    there = SOUND | {name.replace("_", "-"): version for name, version in versions.items()}
    return "\n".join(
        checks.problems(
            on_cuda=on_cuda,
            installed=there.get,
            requirements=lambda name: TRUE_LIMITS.get(name, ()),
        )
    )


def test_nothing_stands_in_the_way_on_a_sound_machine() -> None:
    assert problems() == ""
    assert problems(typer=None, sentencepiece=None) == ""  # what training does without


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        (
            dict(transformers="5.23.0"),
            (
                "transformers 5.23.0 is here",
                "admits transformers<=5.17.0",
                "pip install 'transformers<=5.17.0,>=4.52.4'",
            ),
        ),
        (dict(transformers="5.0.0"), ("transformers 5.0.0 is here", "admits transformers!=5.0.0")),
        (dict(trl="1.16.0"), ("trl 1.16.0 is here", "admits trl<=1.15.0")),
        (dict(torch="2.15.0"), ("torch 2.15.0 is here", "admits torch<2.15.0")),
        (dict(datasets="4.0.2"), ("datasets 4.0.2 is here", "!=4.0.*")),
        (dict(datasets="5.2.0", trl="1.16.0"), ("datasets 5.2.0", "trl 1.16.0")),
        (dict(triton=None), ("triton is not installed", "pip install 'triton>=3.0.0'")),
        (dict(unsloth_zoo=None), ("unsloth-zoo is not installed",)),
        (dict(peft="0.17"), ("peft 0.17 is here, unsloth-zoo 2026.10.9 admits peft>=0.18.0",)),
    ],
)  # fmt: skip
def test_each_conflict_is_named_with_its_cure(
    versions: dict[str, str | None], told: tuple[str, ...]
) -> None:
    said = problems(**versions)
    for part in told:
        assert part in said
    assert "environment of its own" in said


def test_a_missing_unsloth_and_a_missing_gpu_are_said() -> None:
    assert "not installed" in problems(unsloth=None) and "transformers<=5.17.0" in problems(
        unsloth=None
    )
    assert "sees no CUDA device" in problems(on_cuda=False)
    with pytest.raises(
        ValueError,
        match=r"execution.engine = unsloth cannot run here:\n  it is not installed"
        r"(?s:.)*execution.engine=peft",
    ):
        checks.check_unsloth(on_cuda=True)


def test_a_run_is_refused_before_its_model_is_looked_for(run_of, capsys) -> None:
    with pytest.raises(ValueError, match=r"execution.engine = unsloth cannot run here"):
        run_of(execution={"engine": "unsloth"}, model={"id": "/nowhere"})
    assert "unsloth" not in sys.modules


def test_doctor_and_plan_know_the_engine() -> None:
    from glassloop.doctor.checks import check_engine

    config = from_values({"execution": {"engine": "unsloth"}})
    here = SOUND | {"transformers": "5.23.0"}

    def found(**more: Any) -> list[str]:
        return checks.problems(
            installed=here.get, requirements=lambda name: TRUE_LIMITS.get(name, ()), **more
        )

    (one,) = check_engine(config, on_cuda=True, problems=found)
    assert (
        one.level == "problem"
        and "transformers 5.23.0 is here" in one.text
        and "environment of its own" in one.cure
    )
    assert [one.level for one in check_engine(config, on_cuda=True, problems=lambda **_: [])] == [
        "ok"
    ]
    assert (
        check_engine(from_values({"execution": {"engine": "peft"}}), on_cuda=True, problems=found)
        == []
    )
    plan = plan_of(config, 64, 1)
    outlook = look_ahead(config, plan, rows_from="given")
    assert outlook.ledger is None and outlook.verdicts == () and outlook.times == ()
    assert any("memory and time of execution.engine=unsloth" in line for line in render(outlook))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "quantization", "none"),
        ("model", "attention", "eager"),
        ("lora", "dropout", 0.1),
        ("execution", "precision", "fp32"),
        ("execution", "reduction", "ddp"),
    ],
)
def test_what_it_would_do_otherwise_than_asked_is_refused(
    section: str, field: str, value: Any
) -> None:
    values = {"execution": {"engine": "unsloth"}}
    from_values(values)
    values[section] = {**values.get(section, {}), field: value}
    with pytest.raises(
        (ValueError, ValidationError),
        match=rf"execution.engine = unsloth and {section}\.{field} = (?s:.)*engine=peft",
    ):
        from_values(values)
