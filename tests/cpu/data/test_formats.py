"""Columns by a format's own names, usual names and data.columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from row_files import load, refused, turns, write

from glassloop.config import DataConfig
from glassloop.data import names
from glassloop.data.sources import load_examples

BLOCK = "<think>\nHm.\n</think>\n\nYes."
QUESTION = ("user", "Q?", None)
TALK = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Yes."}]
FROM_TALK = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "Yes."}]


@pytest.mark.parametrize(
    ("kind", "row", "want"),
    [
        (
            "reasoning",
            {"Question": "Q?", "Complex_CoT": "Hm.", "Response": "Yes."},
            [QUESTION, ("assistant", "Yes.", "Hm.")],
        ),
        (
            "prompt_completion",
            {"prompt": "Q?", "completion": " Yes."},
            [QUESTION, ("assistant", " Yes.", None)],
        ),
        (
            "prompt_completion",
            {"prompt": "Q?", "completion": BLOCK},
            [QUESTION, ("assistant", "\n\nYes.", "\nHm.\n")],
        ),
        (
            "prompt_completion",
            {"prompt": [TALK[0]], "completion": [TALK[1]]},
            [QUESTION, ("assistant", "Yes.", None)],
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [("user", "Add.\n\n1 2", None), ("assistant", "3", None)],
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": " \n", "output": "3"},
            [("user", "Add.", None), ("assistant", "3", None)],
        ),
        (
            "alpaca",
            {"instruction": "Add.", "output": "3"},
            [("user", "Add.", None), ("assistant", "3", None)],
        ),
        ("messages", {"messages": TALK}, [QUESTION, ("assistant", "Yes.", None)]),
        ("messages", {"messages": FROM_TALK}, [QUESTION, ("assistant", "Yes.", None)]),
        ("sharegpt", {"conversations": FROM_TALK}, [QUESTION, ("assistant", "Yes.", None)]),
        ("sharegpt", {"conversations": TALK}, [QUESTION, ("assistant", "Yes.", None)]),
        ("text", {"text": "Once upon."}, [("text", "Once upon.", None)]),
    ],
)
def test_a_format_is_told_by_its_columns_and_becomes_turns(
    tmp_path: Path, kind: str, row: dict[str, Any], want: list[tuple[str, str, str | None]]
) -> None:
    loaded = load(tmp_path, [row])
    assert loaded.format == kind
    assert turns(loaded) == want
    assert turns(load(tmp_path, [row], format=kind)) == want


ANSWERS = [name for name in names.COLUMNS["response"] if name not in ("output", "completion")]


@pytest.mark.parametrize("question", names.COLUMNS["question"])
@pytest.mark.parametrize("response", ANSWERS)
def test_a_question_and_an_answer_are_found_by_their_usual_names(
    tmp_path: Path, question: str, response: str
) -> None:
    names = (question, response), (question.upper(), f"{response}s"), (f" {question}s", response)
    for asked, said in names:
        loaded = load(tmp_path, [{"id": "1", asked: "Q?", said: "Yes."}])
        assert loaded.format == "question_answer"
        assert turns(loaded) == [QUESTION, ("assistant", "Yes.", None)]
        assert "not read: columns id" in loaded.notes[0]


@pytest.mark.parametrize("name", names.COLUMNS["reasoning"])
def test_reasoning_is_found_by_its_usual_names(tmp_path: Path, name: str) -> None:
    loaded = load(tmp_path, [{"question": "Q?", name.upper(): "Hm.", "answer": "Yes."}])
    assert turns(loaded)[1] == ("assistant", "Yes.", "Hm.")


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"input": "Q?", "output": "Yes."}, [QUESTION]),
        ({"context": "Text.", "question": "Q?", "answer": "Yes."}, [("user", "Q?\n\nText.", None)]),
        (
            {"System": "Be brief.", "question": "Q?", "answer": "Yes."},
            [("system", "Be brief.", None), QUESTION],
        ),
        ({"system": "", "question": "Q?", "answer": "Yes."}, [QUESTION]),
        (
            {"history": [["A?", "B."]], "question": "Q?", "answer": "Yes."},
            [("user", "A?", None), ("assistant", "B.", None), QUESTION],
        ),
        (
            {"history": '[["A?", "B."]]', "question": "Q?", "answer": "Yes."},
            [("user", "A?", None), ("assistant", "B.", None), QUESTION],
        ),
        ({"history": [], "question": "Q?", "answer": "Yes."}, [QUESTION]),
        ({"system": "S.", "conversations": FROM_TALK}, [("system", "S.", None), QUESTION]),
        ({"chat": TALK}, [QUESTION]),
    ],
)
def test_what_belongs_to_the_conversation_is_read_beside_it(
    tmp_path: Path, row: dict[str, Any], want: list[Any]
) -> None:
    assert turns(load(tmp_path, [row])) == [*want, ("assistant", "Yes.", None)]


def test_columns_and_keys_that_are_not_read_are_named(tmp_path: Path) -> None:
    talk = [{**TALK[0], "id": 3, "empty": None}, {**TALK[1], "score": 1}]
    row = {"messages": talk, "source": "x", "a\x1b[2J": "y"}
    (note,) = load(tmp_path, [row]).notes
    assert note.startswith("columns read: messages=messages; not read: columns source, a\\x1b[2J")
    assert note.endswith("keys of messages id, score")


def test_messages_may_stand_in_a_table_as_json(tmp_path: Path) -> None:
    import json

    assert turns(load(tmp_path, [{"messages": json.dumps(TALK)}], "a.csv"))[0] == QUESTION


def test_any_columns_serve_by_a_map(tmp_path: Path) -> None:
    row = {"id": 7, "ask": "Q?", "why": "Hm.", "say": "Yes."}
    columns = {"question": "ask", "reasoning": "why", "response": "say"}
    assert turns(load(tmp_path, [row], columns=columns)) == [QUESTION, ("assistant", "Yes.", "Hm.")]
    del columns["reasoning"]
    assert turns(load(tmp_path, [row], columns=columns))[1] == ("assistant", "Yes.", None)
    calls = {"dialogue": "talk", "label": "bad"}
    row = {"talk": "caller: hi", "bad": 1}
    loaded = load(tmp_path, [row], columns=calls, scam_reasoning="none")
    assert loaded.format == "scam"
    assert turns(load(tmp_path, [{"body": "T."}], columns={"text": "body"})) == [
        ("text", "T.", None)
    ]


def test_a_whole_text_is_said_to_be_trained_whole(tmp_path: Path) -> None:
    assert "every row is a text, trained whole" in load(tmp_path, [{"text": "Once."}]).notes


# Preferences


PREFERENCE = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCE,
        {"chosen": TALK, "rejected": TALK},
        {"prompt": "Q?", "chosen": TALK, "rejected": TALK},
        {"prompt": [TALK[0]], "chosen": [TALK[1]], "rejected": [TALK[1]]},
        {"question": "Q?", "chosen": [TALK[1]], "rejected": [TALK[1]], "messages": TALK},
    ],
)
def test_a_preference_file_is_refused_by_that_word_and_trained_on_chosen_if_asked(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    refused(tmp_path, [row], r"is a preference file: .*Set data\.format=chosen to train on the ch")
    loaded = load(tmp_path, [row], format="chosen")
    assert turns(loaded) == [QUESTION, ("assistant", "Yes.", None)]
    assert "not read: columns rejected" in loaded.notes[0]


def test_a_chosen_text_needs_its_question(tmp_path: Path) -> None:
    row = {"chosen": "Yes.", "rejected": "No."}
    refused(tmp_path, [row], "no column holds its question", format="chosen")


# Refusals


@pytest.mark.parametrize(
    ("row", "data", "match"),
    [
        (
            {"who": "x", "what": "y"},
            {},
            r"has columns who, what; none of them is known to hold the question\. Say which does: "
            r"data\.source=\S+rows\.jsonl data\.columns\.question=who data\.columns\.response=what",
        ),
        (
            {"id": "1", "question": "x", "my text": "y"},
            {},
            r"known to hold the answer.*data\.columns\.question=question "
            r"'data\.columns\.response=my text'",
        ),
        (
            {"Nr": "1", "Frage": "x", "Antwort, lang": "y", "Notiz": "z"},
            {},
            r"has columns Nr, Frage, 'Antwort, lang', Notiz; none of them.*"
            r"data\.columns\.question=NAME data\.columns\.response=NAME \(",
        ),
        (
            {"problem": "x", "answer": "y", "solution": "z"},
            {},
            r"several columns that may hold the response: answer, solution\. Choose one: .*"
            r"data\.columns\.question=problem data\.columns\.response=answer",
        ),
        (
            {"question": "x", "prompt": "y", "answer": "z"},
            {},
            r"may hold the question: question, prompt\..*data\.columns\.question=question ",
        ),
        (
            {"question": "x", "answer": "y", "cot": "a", "thinking": "b"},
            {},
            r"may hold the reasoning: cot, thinking\. Choose one: data\.columns\.reasoning=cot",
        ),
        ({"only": "x"}, {}, r"Say which does: data\.source=\S+ data\.columns\.text=only"),
        (
            {"a": "x", "b": "y"},
            {"columns": {"question": "c"}},
            r"data\.columns\.question = 'c': .* has no such column; it has a, b",
        ),
        (
            {"a": "x", "b": "y"},
            {"format": "scam"},
            r"has no column 'dialogue', which format scam reads as dialogue; it has a, b",
        ),
        (
            {"question": "x", "Complex_CoT": "y", "Response": "z"},
            {"format": "reasoning"},
            r"no column 'Question'.*did you mean 'question'\? \(set data\.columns\.question=NAME",
        ),
        ({"dialogue": "x", "label": 1}, {}, "no column 'type'"),
        ({"prompt": "x", "completion": "y"}, {"format": "alpaca"}, "no column 'instruction'"),
        (
            {"prompt": "x", "completion": "y"},
            {"format": "alpaca", "columns": {"dialogue": "prompt"}},
            r"data\.columns\.dialogue = 'prompt': format alpaca reads no such column",
        ),
    ],
)
def test_columns_that_cannot_be_told_are_listed_with_the_line_to_type(
    tmp_path: Path, row: dict[str, Any], data: dict[str, Any], match: str
) -> None:
    refused(tmp_path, [row], match, **data)


def test_the_line_of_a_refusal_works(tmp_path: Path) -> None:
    import shlex

    source = write(tmp_path / "my file.jsonl", [{"who is it": "Q?", "what": "Yes."}])
    with pytest.raises(ValueError, match="Say which does") as caught:
        load_examples(DataConfig(source=source), 0)
    line = str(caught.value).split("Say which does: ")[1].split(" (")[0]
    words = dict(word.split("=", 1) for word in shlex.split(line))
    columns = {name.rpartition(".")[2]: value for name, value in words.items() if "columns" in name}
    loaded = load_examples(DataConfig(source=words["data.source"], columns=columns), 0)  # type: ignore[arg-type]
    assert turns(loaded) == [QUESTION, ("assistant", "Yes.", None)]


def test_many_columns_do_not_flood_the_terminal(tmp_path: Path) -> None:
    refused(tmp_path, [{f"c{number}": "x" for number in range(3000)}], "c19 and 2,980 more;")
