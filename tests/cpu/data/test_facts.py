"""Facts counted over parts, and the few examples that decide a template."""

from __future__ import annotations

import itertools
from dataclasses import fields

from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data.facts import Facts, facts_of, telling, together
from glassloop.data.rows import Example, Turn
from glassloop.data.templates import make_template
from glassloop.data.tokens import make_codec

ASKED, SAID = Turn("user", "How many?"), Turn("assistant", "Four.")
KINDS = {
    "plain": (ASKED, SAID),
    "reasoned": (ASKED, Turn("assistant", "Four.", "Two and two.")),
    "system": (Turn("system", "Be brief."), ASKED, SAID),
    "several": (ASKED, SAID, ASKED, SAID),
    "text": (Turn("text", "Four is even."),),
}


def test_the_telling_examples_decide_the_template_of_all(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for kinds in itertools.permutations(KINDS, 3):
        examples = [Example(f"{kind}:{place}", KINDS[kind]) for kind in kinds for place in range(3)]
        few = telling(examples)
        assert len(few) <= 4
        firsts = {f"{kind}:0" for kind in kinds if kind in ("reasoned", "system", "several")}
        assert firsts <= {one.row_id for one in few}
        assert few == tuple(one for one in examples if one in few)
        for name in ("chat", "instruct"):
            data = DataConfig(template=name)
            whole, part = (make_template(data, tiny_tokenizer, one) for one in (examples, few))
            assert (whole.opens_think, whole.chat_template) == (
                part.opens_think,
                part.chat_template,
            )
    assert telling([]) == ()


def test_facts_of_parts_add_up(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    codec = make_codec(tiny_tokenizer)
    spelling = (Turn("user", "<s>"), Turn("assistant", "<s> <|user|>"))
    examples = [Example(f"a:{at}", turns, "scam") for at, turns in enumerate(KINDS.values())]
    examples += [Example("b:0", spelling, "honest", tools="[]"), Example("b:1", spelling)]
    whole = facts_of(examples, codec, ("<s>",))
    assert (
        together(facts_of(examples[at : at + 2], codec, ("<s>",)) for at in (0, 2, 4, 6)) == whole
    )
    assert whole == Facts(
        answers=7,
        reasoned=1,
        offered=1,
        spelling=2,
        spelled={"<s>": 2, "<|user|>": 2},
        answers_spell=("<|user|>",),
        labels={"scam": 5, "honest": 1},
    )
    assert len(fields(Facts)) == 7  # each is added in `together`
