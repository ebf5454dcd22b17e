"""Conversations as token ids: templates, the supervised part, the one label shift.

| template | what it writes |
| --- | --- |
| r1 | DeepSeek's chat format, reasoning kept in every turn (DeepSeek's own template drops it) |
| instruct | the recipe's text form; one question, one answer |
| chat | the tokenizer's own chat template (see chat_template.py) |

Supervised is each assistant turn from behind its generation prompt up to and including its end
token, but for turns that carry no loss (Turn.trained). r1 and instruct take whitespace off both
ends of reasoning and answer, and nothing else from a row. A row that is a whole text is BOS, its
text and EOS under every template, supervised.

Think tags. If every assistant turn of the data has reasoning, the prompt opens the block, as
DeepSeek's does, and training begins behind `<think>`. If some or all have none, the prompt ends
before `<think>`: a turn with reasoning then opens its block itself, supervised, and one without has
no block at all, so the model learns when to think, and no empty block is ever trained. One rule
holds for the whole data set, so that the saved template's generation prompt is the prompt of every
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from glassloop.config import DataConfig
from glassloop.data.bounded import bounded
from glassloop.data.chat_template import MessageOf, Parts, chat_parts
from glassloop.data.own_templates import (
    R1_MARKS,
    instruct,
    instruct_source,
    message_of,
    r1,
    r1_source,
)
from glassloop.data.rows import IGNORE, Example, Row, RowFault, Turn
from glassloop.data.tokens import Codec, Part, answer, encode_rows, make_codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Name = Literal["r1", "instruct", "chat"]
TEXT_PROMPT_TOKENS = 16  # of a whole text, from which generation goes on


@dataclass(frozen=True)
class Template:
    """How conversations of one run become tokens."""

    name: Name
    codec: Codec
    parts: Parts
    message: MessageOf
    opens_think: bool  # the generation prompt ends in an open think block
    labels: Literal["response", "last", "everything"]
    chat_template: str
    """Jinja template to save with the adapter: its generation prompt gives the ids of `prompt_ids`
    for text without control tokens."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer; every row that is not cut ends in one, supervised."""
    why: str = ""
    """Reason of data.template=auto for this one; empty if it was named."""

    drops_earlier: bool = False
    """Whether it leaves out reasoning that stands before a row's last question."""
    writes_tools: bool = False
    """Whether the template lists the tools that a row offers."""

    def encode(self, example: Example) -> Row:
        """Encode the whole conversation, never cut.

        Raises RowFault for a conversation that the template cannot write.
        """
        return self.encode_many([example])[0]

    def encode_many(self, examples: Sequence[Example]) -> list[Row]:
        """`encode` of each, faster."""
        rows = []
        for row in self.try_encode(examples):
            if isinstance(row, RowFault):
                raise row
            rows.append(row)
        return rows

    def try_encode(self, examples: Sequence[Example]) -> list[Row | RowFault]:
        """`encode` of each, with a fault in place of a bad row."""
        result: list[Row | RowFault] = []
        parts: list[list[Part]] = []
        for example in examples:
            try:
                parts.append(self._parts(example, example.turns, False))
                result.append(Row(example.row_id, (), ()))  # a place, filled below
            except RowFault as fault:
                result.append(fault)
        places = [place for place, row in enumerate(result) if isinstance(row, Row)]
        encoded = encode_rows(self.codec, parts, [examples[place].row_id for place in places])
        for place, one in zip(places, encoded, strict=True):
            if isinstance(one, RowFault):
                result[place] = one
                continue
            ids, supervised = one
            flags = [True] * len(ids) if self.labels == "everything" else supervised
            result[place] = Row(examples[place].row_id, tuple(ids), (False, *flags[1:]))
        return result

    def prompt_ids(self, example: Example) -> list[int]:
        """Ids that the model continues with its answer, a prefix of `encode`'s.

        All before that turn and the generation prompt; of a whole text, its beginning.
        """
        if example.turns[0].role == "text":
            ids = self.encode(example).input_ids
            return list(ids[: max(1, min(TEXT_PROMPT_TOKENS, len(ids) // 2))])
        parts = self._parts(example, _before_answer(example.turns), True)
        encoded = encode_rows(self.codec, [parts], [example.row_id])[0]
        if isinstance(encoded, RowFault):
            raise encoded
        return encoded[0]

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """The conversation as `apply_chat_template` takes it."""
        return [self.message(turn) for turn in example.turns]

    def _parts(
        self, example: Example, turns: Sequence[Turn], generation_prompt: bool
    ) -> list[Part]:
        if turns and turns[0].role == "text":
            begin: list[Part] = [] if self.codec.begin is None else [(self.codec.begin, False)]
            return [*begin, *answer(self.codec, turns[0].content, True), (self.codec.end, True)]
        tools = example.tools if self.writes_tools else None
        try:
            return self.parts(turns, generation_prompt, tools)
        except RowFault as fault:
            raise RowFault(fault.kind, f"row {example.row_id}: {fault}") from fault


def make_template(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Template:
    """Make the template that `data` names, for the rows of a run.

    Checked before it is returned: on probe conversations, the saved chat template gives the ids
    that training gives.

    Args:
        examples: All rows, held-out ones too; they decide about think tags.

    Raises:
        ValueError: The tokenizer lacks what the template needs.
    """
    answers = [turn for example in examples for turn in example.turns if turn.role == "assistant"]
    opens_think = all(turn.reasoning is not None for turn in answers) and (
        bool(answers) or not examples
    )
    codec = make_codec(tokenizer, data.answer_tokens)
    name, why = template_for(tokenizer, codec) if data.template == "auto" else (data.template, "")
    if data.template_args and name != "chat":
        raise ValueError(
            f"data.template_args = {', '.join(data.template_args)}: they are for the tokenizer's "
            f"own template, and data.template is {name}; leave them out or set data.template=chat"
        )
    if name == "chat":
        parts, message, source, stop_ids, tools, earlier = chat_parts(
            codec, tokenizer, data.template_args
        )
        template = Template(
            "chat",
            codec,
            parts,
            message,
            False,
            data.labels,
            source,
            stop_ids,
            writes_tools=tools,
            drops_earlier=earlier,
        )
    elif name == "r1":
        missing = [mark for mark in R1_MARKS if mark not in codec.control]
        wanted = ", ".join(missing) or "to begin with"
        if missing or codec.begin is None:
            raise ValueError(
                f"data.template = r1: the tokenizer of {tokenizer.name_or_path} has no token "
                f"{wanted}; set data.template=chat"
            )
        parts, source = r1(codec, codec.begin, opens_think), r1_source(opens_think)
        template = Template(
            "r1", codec, parts, message_of("\n\n"), opens_think, data.labels, source, (codec.end,)
        )
    else:
        parts, source = instruct(codec, opens_think), instruct_source(codec, opens_think)
        template = Template(
            "instruct",
            codec,
            parts,
            message_of("\n"),
            opens_think,
            data.labels,
            source,
            (codec.end,),
        )
    _check(template, tokenizer, examples, thinks=opens_think)
    return replace(template, why=why)


def template_for(tokenizer: PreTrainedTokenizerBase, codec: Codec) -> tuple[Name, str]:
    """The template that data.template=auto takes for a tokenizer, and why."""
    own = tokenizer.chat_template
    if codec.begin is not None and all(mark in codec.control for mark in R1_MARKS):
        return "r1", "the tokenizer has DeepSeek-R1's marks"
    if own.get("default") if isinstance(own, dict) else own:
        return "chat", "the tokenizer's own"
    return "instruct", "the tokenizer has no chat template, as a base model's"


def fit(row: Row, max_tokens: int, policy: Literal["drop", "cut"]) -> Row | None:
    """Drop or cut a row that has more than `max_tokens`.

    "drop" gives None, "cut" the row's beginning.

    A cut row is `truncated` and lacks its end token. None too if nothing supervised would be left:
    such a row teaches nothing.
    """
    if len(row) <= max_tokens:
        return row
    if policy == "drop" or not any(row.supervised[:max_tokens]):
        return None
    return replace(
        row,
        input_ids=row.input_ids[:max_tokens],
        supervised=row.supervised[:max_tokens],
        truncated=True,
    )


def targets(row: Row) -> list[int]:
    """Shift labels: place t gets the token that follows, or IGNORE.

    IGNORE stands where the following token is not supervised.
    """
    following = zip(row.input_ids[1:], row.supervised[1:], strict=True)
    return [token if supervised else IGNORE for token, supervised in following] + [IGNORE]


def _before_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def _check(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    thinks: bool,
) -> None:
    """Check a template on probes of the kinds in `examples`.

    Raises ValueError if generation would not get the tokens of training.
    """
    said = Turn("assistant", "It has eight.", "A spider is an arachnid." if thinks else None)
    asked = (Turn("user", "How many legs has a spider?"), said)
    first = examples[0].row_id if examples else "none"
    probes = [Example(first, asked)]  # under the id of a row of the kind, for messages
    if system := next((example for example in examples if example.turns[0].role == "system"), None):
        probes.append(Example(system.row_id, (Turn("system", "Be brief."), *asked)))
    if several := next(
        (
            example
            for example in examples
            if [turn.role for turn in example.turns].count("assistant") > 1
        ),
        None,
    ):
        probes.append(Example(several.row_id, (*asked, Turn("user", "And a bee?"), said)))
    for place, probe in enumerate(probes):
        try:
            row, prompt = template.encode(probe), template.prompt_ids(probe)
        except RowFault:
            if place == 0:
                raise
            continue  # rows of this kind are faults, counted when they are encoded
        with bounded("the chat template"):
            saved = tokenizer.apply_chat_template(
                template.messages(probe)[:-1],
                chat_template=template.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        begins = list(row.input_ids[: len(prompt)]) == prompt
        ends = row.supervised[-1] and row.input_ids[-1] in template.stop_ids
        if saved != prompt or not begins or not ends:
            raise ValueError(
                f"data.template = {template.name}: with the tokenizer of {tokenizer.name_or_path} "
                "generation would not get the tokens of training (saved template "
                f"{saved[-12:]}, prompt {prompt[-12:]}, row {row.input_ids[-12:]}); choose another "
                "data.template"
            )
