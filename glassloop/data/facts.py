"""Counts over rows: reasoning, tools, classes, control tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from glassloop.data.rows import Example
from glassloop.data.tokens import Codec


@dataclass(frozen=True)
class Facts:
    """Counts over examples; those of parts add up.

    Attributes:
        answers: Assistant turns.
        reasoned: Assistant turns with reasoning.
        offered: Rows that offer tools.
        spelling: Rows whose text spells a control token.
        spelled: Control token -> rows whose text spells it.
        answers_spell: Control tokens that answers spell and may not use.
        labels: Class -> rows.
    """

    answers: int = 0
    reasoned: int = 0
    offered: int = 0
    spelling: int = 0
    spelled: dict[str, int] = field(default_factory=dict)
    answers_spell: tuple[str, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)


def facts_of(examples: Iterable[Example], codec: Codec, answer_tokens: Sequence[str]) -> Facts:
    """Count over examples. `answer_tokens`: control tokens that answers may use."""
    answers = reasoned = offered = spelling = 0
    spelled: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    answers_spell: set[str] = set()
    for one in examples:
        found: set[str] = set()
        for turn in one.turns:
            if turn.role == "assistant":
                answers += 1
                reasoned += turn.reasoning is not None
            if here := codec.spelled(turn.content):
                if turn.role in ("assistant", "text"):
                    here -= set(answer_tokens)
                    answers_spell |= here
                found |= here
        spelled.update(found)
        spelling += bool(found)
        offered += one.tools is not None
        if one.label is not None:
            labels[one.label] += 1
    return Facts(
        answers,
        reasoned,
        offered,
        spelling,
        dict(spelled),
        tuple(sorted(answers_spell)),
        dict(labels),
    )


def together(parts: Iterable[Facts]) -> Facts:
    """The facts of all parts."""
    total = Facts()
    for part in parts:
        total = Facts(
            total.answers + part.answers,
            total.reasoned + part.reasoned,
            total.offered + part.offered,
            total.spelling + part.spelling,
            dict(Counter(total.spelled) + Counter(part.spelled)),
            tuple(sorted({*total.answers_spell, *part.answers_spell})),
            dict(Counter(total.labels) + Counter(part.labels)),
        )
    return total


def telling(examples: Iterable[Example]) -> tuple[Example, ...]:
    """Choose the few examples that decide a template, in order.

    They are the first of each kind that `make_template` looks for.
    """
    places: dict[str, int] = {}  # kind -> its first example
    found: dict[int, Example] = {}
    for place, example in enumerate(examples):
        answers = [turn.reasoning for turn in example.turns if turn.role == "assistant"]
        kinds = {
            "any": True,
            "with reasoning": any(reasoning is not None for reasoning in answers),
            "without reasoning": None in answers,
            "with a system turn": example.turns[0].role == "system",
            "with several answers": len(answers) > 1,
        }
        for kind, holds in kinds.items():
            if holds and kind not in places:
                places[kind] = place
                found[place] = example
    return tuple(found[place] for place in sorted(found))
