"""Promises of data/calls.jsonl, the product's own sample, and numbers of data/README.md."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[3] / "data"
COLUMNS = {"dialogue": str, "type": str, "label": int, "reasoning": str, "response": str}
VERDICTS = {1: "Verdict: scam", 0: "Verdict: not a scam"}
SPEAKER = re.compile(r"(?:^| )(caller|receiver): ")
LONGEST_SHARED_WORDS = 6
BEST_THRESHOLD_ACCURACY = (
    0.68  # with shuffled labels the best cut reaches 0.56 (median) to 0.65 (99 of 100)
)

SURFACE: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
    "turns": lambda text: len(SPEAKER.findall(text)),
    "capitals": lambda text: sum(character.isupper() for character in text),
    "digits": lambda text: sum(character.isdigit() for character in text),
    "full stops": lambda text: text.count("."),
    "commas": lambda text: text.count(","),
    "question marks": lambda text: text.count("?"),
    "exclamation marks": lambda text: text.count("!"),
    "apostrophes": lambda text: text.count("'"),
    "hyphens": lambda text: text.count("-"),
}


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (DATA / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def turns_of(dialogue: str) -> list[tuple[str, str]]:
    """(speaker, words) in order; '' speaks before the first speaker."""
    before, *parts = SPEAKER.split(dialogue)
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    return [("", before), *turns] if before else turns


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def advice(response: str) -> str:
    return response.rpartition("\n")[0]


def test_half_of_96_calls_are_scams(calls: list[dict[str, Any]]) -> None:
    assert [sum(call["label"] == label for call in calls) for label in (1, 0)] == [48, 48]
    assert len(calls) == 96


def test_every_row_has_exactly_the_columns(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        assert {name: type(value) for name, value in call.items()} == COLUMNS
        assert call["label"] in (0, 1)
        assert all(
            value.strip() == value != "" for value in call.values() if isinstance(value, str)
        )


def test_caller_and_receiver_take_turns(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        turns = turns_of(call["dialogue"])
        assert 4 <= len(turns) <= 9, call["dialogue"]
        assert [speaker for speaker, _ in turns] == ["caller", "receiver"] * (len(turns) // 2) + [
            "caller"
        ] * (len(turns) % 2)
        assert all(said.strip() for _, said in turns)
        assert "\n" not in call["dialogue"]


def test_texts_are_short_and_bounded(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        spoken = sum(len(said.split()) for _, said in turns_of(call["dialogue"]))
        assert 60 <= spoken <= 140, f"{spoken} words: {call['dialogue']}"
        assert 25 <= len(call["reasoning"].split()) <= 60, call["reasoning"]
        assert 2 <= sentences(call["reasoning"]) <= 3, call["reasoning"]
        assert sentences(advice(call["response"])) == 1, call["response"]
        assert call["response"].count("\n") == 1, call["response"]


def test_at_least_12_types_a_class_and_none_in_both(calls: list[dict[str, Any]]) -> None:
    types = {label: {call["type"] for call in calls if call["label"] == label} for label in (1, 0)}
    assert min(len(types[1]), len(types[0])) >= 12
    assert not types[1] & types[0]
    assert all(
        re.fullmatch(r"[a-z]+(_[a-z]+)*", slug) and len(slug) <= 20 for slug in types[1] | types[0]
    )
    assert max(sum(call["type"] == slug for call in calls) for slug in types[1] | types[0]) <= 3


def test_verdict_line_agrees_with_the_label(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        assert call["response"].rpartition("\n")[2] == VERDICTS[call["label"]], call["response"]
        assert (
            "verdict:"
            not in (call["dialogue"] + call["reasoning"] + advice(call["response"])).lower()
        )


@pytest.mark.parametrize("column", ["dialogue", "reasoning", "response"])
def test_no_two_calls_share_a_long_run_of_words(calls: list[dict[str, Any]], column: str) -> None:
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, call in enumerate(calls):
        text = advice(call[column]) if column == "response" else call[column]
        words = re.findall(r"[\w']+", text.lower())
        for start in range(len(words) - LONGEST_SHARED_WORDS):
            owners[tuple(words[start : start + LONGEST_SHARED_WORDS + 1])].add(number)
    assert [" ".join(run) for run, rows in owners.items() if len(rows) > 1] == []


@pytest.mark.parametrize("column", ["dialogue", "reasoning", "response"])
def test_mean_lengths_of_the_classes_agree(calls: list[dict[str, Any]], column: str) -> None:
    def mean_words(label: int) -> float:
        texts = [call[column] for call in calls if call["label"] == label]
        if (
            column == "response"
        ):  # without the verdict line, which is two words longer for honest calls
            texts = [advice(text) for text in texts]
        return sum(len(text.split()) for text in texts) / len(texts)

    assert mean_words(1) == pytest.approx(mean_words(0), rel=0.10)


@pytest.mark.parametrize("feature", SURFACE)
def test_no_threshold_on_the_surface_tells_the_label(
    calls: list[dict[str, Any]], feature: str
) -> None:
    scored = [(SURFACE[feature](call["dialogue"]), call["label"]) for call in calls]
    right = [
        sum((value > cut) == label for value, label in scored)
        for cut in {value for value, _ in scored}
    ]
    best = max(max(right), len(scored) - min(right)) / len(scored)
    assert best <= BEST_THRESHOLD_ACCURACY, f"{feature} alone tell {best:.0%} of the labels"


def test_phone_numbers_are_fictional(calls: list[dict[str, Any]]) -> None:
    text = "\n".join(value for call in calls for value in call.values() if isinstance(value, str))
    numbers = re.findall(r"\+?\d(?:[ ()./-]*\d){6,}", text)
    assert numbers
    assert [number for number in numbers if not re.fullmatch(r"555-01\d\d", number)] == []


def test_texts_hold_no_model_markup(calls: list[dict[str, Any]]) -> None:
    assert not [
        call["dialogue"]
        for call in calls
        if re.search(r"[<>{}|｜\[\]]", "".join(map(str, call.values())))
    ]


def test_classes_are_mixed_in_the_file(calls: list[dict[str, Any]]) -> None:
    assert max(len(list(run)) for _, run in groupby(call["label"] for call in calls)) <= 8


def test_readme_states_the_counts_of_the_file(calls: list[dict[str, Any]]) -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    kinds = {
        label: len({call["type"] for call in calls if call["label"] == label}) for label in (1, 0)
    }
    assert f"{kinds[1]} kinds are scams, {kinds[0]} are honest" in readme
    assert "96 phone calls in English, 48 scams and 48 honest calls" in readme
    assert all(f"| `{column}` |" in readme for column in COLUMNS)
