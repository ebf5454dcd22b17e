"""Format scam: a call becomes a question, cues and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from row_files import load, refused

from glassloop.data.rows import Turn
from glassloop.data.scam import (
    CONCLUSIONS,
    CUES,
    OTHER_CUES,
    SCAM_QUESTION,
    VERDICTS,
    verdict_of,
)

CALL = "caller: Hello. receiver: Who is this?"


def call(**cells: Any) -> dict[str, Any]:
    return {"dialogue": CALL, "type": "ssn", "label": 1, **cells}


def test_a_call_becomes_a_question_cues_and_a_verdict(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [call()]).train
    question, answer = example.turns
    assert question == Turn("user", SCAM_QUESTION + CALL)
    assert answer == Turn(
        "assistant", "Verdict: scam", f"{CUES['ssn', 'scam']} {CONCLUSIONS['scam']}"
    )
    assert example.label == "scam"


def test_the_prompt_of_a_call_depends_on_neither_type_nor_label(tmp_path: Path) -> None:
    rows = [
        call(type=kind, label=int(label == "scam"))
        for kind, label in [*CUES, ("odd", "scam"), ("odd", "honest")]
    ]
    loaded = load(tmp_path, rows)
    assert {example.turns[0] for example in loaded.train} == {Turn("user", SCAM_QUESTION + CALL)}
    assert {example.label for example in loaded.train} == {"scam", "honest"}


@pytest.mark.parametrize(("kind", "label"), [("odd", 1), ("odd", 0), ("ssn", 0), (None, 1)])
def test_a_type_that_is_unknown_or_known_for_the_other_class_gets_the_general_cues(
    tmp_path: Path, kind: str, label: int
) -> None:
    name = "scam" if label else "honest"
    (example,) = load(tmp_path, [call(type=kind, label=label)]).train
    assert example.turns[1].reasoning == f"{OTHER_CUES[name]} {CONCLUSIONS[name]}"


def test_no_reasoning_stands_in_a_call_if_none_is_asked_for(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [{"dialogue": CALL, "label": "0"}], scam_reasoning="none").train
    assert example.turns[1] == Turn("assistant", "Verdict: not a scam", None)


def test_reasoning_and_response_of_a_call_are_kept_where_it_brings_them(tmp_path: Path) -> None:
    rows = [
        call(reasoning="They hurry.", response="Hang up.\nVerdict: scam"),
        call(reasoning="", response="Verdict: scam"),
    ]
    loaded = load(tmp_path, rows, shuffle=False)
    assert loaded.train[0].turns[1] == Turn("assistant", "Hang up.\nVerdict: scam", "They hurry.")
    assert loaded.train[1].turns[1].reasoning == f"{CUES['ssn', 'scam']} {CONCLUSIONS['scam']}"


@pytest.mark.parametrize(
    ("response", "claim"),
    [("Verdict: not a scam", "says honest"), ("It is bad.", "names no verdict")],
)
def test_a_response_that_contradicts_the_label_is_refused(
    tmp_path: Path, response: str, claim: str
) -> None:
    refused(
        tmp_path,
        [call(response="Verdict: scam"), call(response=response)],
        rf"row 1: the response {claim}, but label = 1 says scam",
    )


@pytest.mark.parametrize("label", [1, "1", 1.0, True, "scam", " Scam "])
def test_a_scams_label_may_be_written_in_several_ways(tmp_path: Path, label: Any) -> None:
    assert load(tmp_path, [call(label=label)]).train[0].label == "scam"


@pytest.mark.parametrize("label", [2, "", "maybe", None, 0.5])
def test_another_label_is_refused(tmp_path: Path, label: Any) -> None:
    refused(tmp_path, [call(label=label)], "row 0: label = .*labelled 1 or scam, 0 or honest")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: scam", "scam"),
        ("Hang up.\n**Verdict:** Scam.", "scam"),
        ("Verdict: 'not a scam'", "honest"),
        ("verdict : Not a scam!", "honest"),
        ("Verdict: scam\nOn second thought:\nVerdict: not a scam", "honest"),
        ("Verdict: scam\n</think>\n\nVerdict: not a scam<end>", None),
        ("Verdict: scam\n</think>\n\nVerdict: not a scam", "honest"),
        ("Verdict: scam\n</think>\n\nI do not know.", None),
        ("Verdict: scam or not a scam", None),
        ("Verdict:", None),
        ("This is a scam.", None),
        ("", None),
        *[(text, label) for label, text in VERDICTS.items()],
    ],
)
def test_the_verdict_is_read_from_the_last_verdict_line(text: str, verdict: str | None) -> None:
    assert verdict_of(text) == verdict
