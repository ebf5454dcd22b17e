"""From a row to its turns, with reasoning, loss and tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from row_files import ids, load, refused, turns

from glassloop.config import DataConfig
from glassloop.data.names import REASONING_KEYS
from glassloop.data.rows import Turn
from glassloop.data.sources import load_examples

BLOCK = "<think>\nHm.\n</think>\n\nYes."


def user(content: str = "Q?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def said(content: Any = "Yes.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def talk(*messages: dict[str, Any], **cells: Any) -> dict[str, Any]:
    return {"messages": list(messages), **cells}


def test_every_turn_is_read_and_text_of_users_keeps_its_tags(tmp_path: Path) -> None:
    row = talk(
        {"role": "system", "content": "Be brief."},
        user(),
        said(BLOCK),
        user("<think>mine</think>"),
        said("<think>\n\n</think>No.", reasoning_content=None),
        user("left out"),
    )
    assert turns(load(tmp_path, [row])) == [
        ("system", "Be brief.", None),
        ("user", "Q?", None),
        ("assistant", "\n\nYes.", "\nHm.\n"),
        ("user", "<think>mine</think>", None),
        ("assistant", "No.", None),
    ]


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_beside_an_answer_is_read_whatever_its_key(tmp_path: Path, key: str) -> None:
    loaded = load(tmp_path, [talk(user(), said(**{key: "Hm."}))])
    assert turns(loaded)[1] == ("assistant", "Yes.", "Hm.")


def test_two_reasonings_are_taken_if_they_agree_and_refused_if_not(tmp_path: Path) -> None:
    same = talk(user(), said(BLOCK, reasoning="Hm.", thinking="Hm."))
    assert turns(load(tmp_path, [same]))[1] == ("assistant", "\n\nYes.", "\nHm.\n")
    refused(tmp_path, [talk(user(), said(reasoning="a", cot="b"))], "reasoning, cot differ; keep")
    refused(tmp_path, [talk(user(), said(BLOCK, reasoning="Ah."))], "and another within; keep one")


# Think tags


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Hm.\n</think>\n\nYes.", ("Yes.", "Hm.")),
        ("Hm.</think>Yes.", ("Yes.", "Hm.")),
        ("</think>\n\nYes.", ("Yes.", None)),
        ("See </think> and </think>.", ("See </think> and </think>.", None)),
        ("Write <think> and </think>.", ("Write <think> and </think>.", None)),
    ],
)
def test_a_closing_tag_alone_ends_the_reasoning_that_the_prompt_opened(
    tmp_path: Path, text: str, want: tuple[str, str | None]
) -> None:
    loaded = load(tmp_path, [talk(user(), said(text))])
    assert turns(loaded)[1][1:] == want
    counted = "1 answers with </think> alone: the text before it is their reasoning"
    assert (counted in loaded.notes) == (text.count("think>") == 1)


@pytest.mark.parametrize(
    "row", [talk(user(), said("<think>\nHm")), {"prompt": "Q?", "completion": " <think>Hm"}]
)
def test_a_think_block_that_never_closes_is_a_fault(tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"prompt": "Q?", "completion": "A."} if "prompt" in row else talk(user(), said())
    refused(tmp_path, [row, good], "opens <think> and never closes it: it was cut off")
    loaded = load(tmp_path, [row, good], on_bad_row="skip")
    assert loaded.skipped == {"think block never closed": 1}


# Loss by turn


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}]
)
def test_a_turn_that_its_row_excludes_carries_no_loss(tmp_path: Path, mark: dict[str, Any]) -> None:
    row = talk(user(), said("bad", **mark), user(), said("good", weight=1), user(), said(**mark))
    loaded = load(tmp_path, [row])
    assert [turn.trained for turn in loaded.train[0].turns] == [True, False, True, True]
    assert (
        "2 assistant turns without loss, as their rows ask (weight 0, train false)" in loaded.notes
    )
    refused(tmp_path, [row], r"data\.labels = everything would train it", labels="everything")
    assert load(tmp_path, [talk(user(), said(**mark)), row]).skipped == {
        "no turn that carries loss": 1
    }


@pytest.mark.parametrize("weight", [0.5, 2, "0", -1])
def test_a_weight_that_is_neither_0_nor_1_is_a_fault(tmp_path: Path, weight: Any) -> None:
    refused(tmp_path, [talk(user(), said(weight=weight))], "message 1: weight = .*has loss")


def test_the_last_answer_alone_carries_loss_if_asked(tmp_path: Path) -> None:
    row = talk(user(), said("a"), user(), said("b"), user(), said("c", weight=0))
    (example,) = load(tmp_path, [row], labels="last").train
    assert [(t.content, t.trained) for t in example.turns if t.role == "assistant"] == [
        ("a", False),
        ("b", True),
    ]


# System prompts


def test_a_system_prompt_stands_before_rows_that_bring_none(tmp_path: Path) -> None:
    own = talk({"role": "system", "content": "Own."}, user(), said())
    blank = talk({"role": "system", "content": " "}, user(), said())
    rows = [own, talk(user(), said()), blank]
    loaded = load(tmp_path, rows, system="Given.", shuffle=False)
    assert [example.turns[0] for example in loaded.train] == [
        Turn("system", "Own."),
        Turn("system", "Given."),
        Turn("system", "Given."),
    ]
    assert load(tmp_path, [blank]).train[0].turns[0].role == "user"


@pytest.mark.parametrize("cells", [{}, {"system": "S."}])
def test_a_system_turn_goes_before_the_first_question_or_is_left_out_and_counted(
    tmp_path: Path, cells: dict[str, str]
) -> None:
    first = [] if cells else [{"role": "system", "content": "S."}]
    row = talk(*first, user(), said(), user(), said(), **cells)
    moved = load(tmp_path, [row], system_turn="user")
    assert [turn.content for turn in moved.train[0].turns] == ["S.\n\nQ?", "Yes.", "Q?", "Yes."]
    assert any("1 system turns put before the first question" in note for note in moved.notes)
    dropped = load(tmp_path, [row], system_turn="drop")
    assert [turn.content for turn in dropped.train[0].turns] == ["Q?", "Yes.", "Q?", "Yes."]
    assert any("1 system turns left out" in note for note in dropped.notes)


def test_system_prompts_that_contradict_are_refused(tmp_path: Path) -> None:
    row = talk({"role": "system", "content": "A."}, user(), said(), system="B.")
    refused(tmp_path, [row], "it has two system prompts; keep one")
    refused(tmp_path, [row], "keep one", system="S.", system_turn="drop")


# Tools


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.mark.parametrize(
    "messages",
    [
        [said("", tool_calls=[{"type": "function", "function": CALL}])],
        [said(None, tool_calls=[{"function": {**CALL, "arguments": '{"city": "Oslo"}'}}])],
        [said("", tool_calls=[CALL])],
        [{"from": "function_call", "value": json.dumps(CALL)}],
    ],
)
def test_a_tool_call_is_read_in_every_form(tmp_path: Path, messages: list[Any]) -> None:
    row = talk(user(), *messages, {"role": "tool", "content": "rain"}, said(), tools=TOOLS)
    (example,) = load(tmp_path, [row]).train
    assert [turn.role for turn in example.turns] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(example.turns[1].extra or "") == {
        "tool_calls": [{"type": "function", "function": CALL}]
    }
    assert json.loads(example.tools or "") == TOOLS
    text = load(tmp_path, [{**row, "tools": json.dumps(TOOLS)}]).train[0].tools
    assert text == example.tools


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (talk(user(), said("", tool_calls=[{"f": 1}])), "each needs a function's name"),
        (talk(user(), said("", tool_calls="x")), "each needs a function's name"),
        (talk(user(), said(function_call={"name": "x"})), "write it as tool_calls"),
        (talk(user(), said(), tools="hammer"), "tools = 'hammer'; a list is needed"),
        ({"question": "Q?", "answer": "A.", "history": ["x"]}, "pairs of question and answer are"),
    ],
)
def test_tools_and_history_that_are_none_are_faults(tmp_path: Path, row: Any, match: str) -> None:
    refused(tmp_path, [row], match)


# Faults and rows without a use


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "", "completion": "y"}, "row 1: question is empty"),
        ({"prompt": None, "completion": "y"}, "row 1: question is empty"),
        ({"completion": "y"}, "row 1: question is empty"),
        ({"prompt": 5, "completion": "y"}, "row 1: question = 5 is int, not text"),
        ({"prompt": {"a": 1}, "completion": "y"}, r"row 1: question = {'a': 1} is dict, not text"),
        ({"prompt": "x" * 99, "completion": {"a": 1}}, "row 1: response = {'a': 1} is dict"),
        (
            {"prompt": "x\0" + "y" * 99, "completion": "y"},
            r"row 1: question = 'x\\x00y+\.\.\. holds a NUL byte at character 1",
        ),
        (
            {"prompt": "\ud800", "completion": "y"},
            "row 1: question = .* holds half of a surrogate pair",
        ),
    ],
)
def test_a_cell_that_is_no_text_is_refused_with_row_and_value(
    tmp_path: Path, row: dict[str, Any], match: str
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "x", "completion": "y"}, row]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {match}"):
        load_examples(DataConfig(source=str(path), shuffle=False), 0)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "row 0: messages = 'hello'; a list of {role, content} is needed"),
        (["hello"], "row 0: messages = .*; a list of {role, content} is needed"),
        ([{"role": "narrator", "content": "x"}], "message 0: role = 'narrator'; known are system"),
        ([{"content": "x"}], "row 0, message 0: role = None"),
        ([user([{"type": "text"}])], "row 0, message 0: content = .* is list, not text"),  # type: ignore[arg-type]
        ([user(" ")], "row 0, message 0: content is empty"),
    ],
)
def test_messages_that_are_none_are_refused_with_row_and_place(
    tmp_path: Path, messages: Any, match: str
) -> None:
    refused(tmp_path, [{"messages": messages}], match, format="messages")


def roles(*given: str) -> dict[str, Any]:
    return talk(*({"role": role, "content": role} for role in given))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (talk(user(), said("")), "empty response"),
        (talk(user(), said("<think>Hm.</think> ")), "empty response"),
        (roles("user"), "no assistant turn"),
        (roles("assistant"), "user and assistant do not take turns"),
        (roles("user", "user", "assistant"), "user and assistant do not take turns"),
        (roles("user", "system", "assistant"), "user and assistant do not take turns"),
        (roles("user", "tool", "assistant"), "user and assistant do not take turns"),
    ],
)
def test_rows_that_teach_nothing_are_skipped_and_counted_by_reason(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    good = talk(user(), said())
    loaded = load(tmp_path, [row, good, row], shuffle=False)
    assert ids(loaded.train) == ["train:1"]
    assert loaded.skipped == {reason: 2}
    assert loaded.total == 3
    refused(tmp_path, [row], f"none of 1 rows can be used, 1 skipped \\({reason}\\)")
    match = rf"data\.rows = 2, but .* only 1 usable rows of 2, 1 skipped \({reason}\)"
    refused(tmp_path, [row, good], match, rows=2)


def test_an_empty_response_or_reasoning_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"Question": "Q?", "Complex_CoT": "Hm.", "Response": "Yes."},
        {"Question": "Q2?", "Complex_CoT": "Hm.", "Response": None},
        {"Question": "Q3?", "Complex_CoT": "", "Response": "Yes."},
    ]
    assert load(tmp_path, rows).skipped == {"empty response": 1, "empty reasoning": 1}
