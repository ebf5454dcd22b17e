"""Conversations as token ids: templates, the supervised part, the one label shift.

| template | what it writes |
| --- | --- |
| r1 | DeepSeek's chat format, reasoning kept in every turn, where DeepSeek's own template drops it |
| instruct | the recipe's text form; one question, one answer |
| chat | the tokenizer's own chat template (see chat_template.py) |

Supervised is each assistant turn from behind its generation prompt up to and including its end token. r1 and instruct take
whitespace off both ends of reasoning and answer, and nothing else from a row.

Think tags. If every assistant turn of the data has reasoning, the prompt opens the block, as DeepSeek's does, and training
begins behind `<think>`. If some or all have none, the prompt ends before `<think>`: a turn with reasoning then opens its block
itself, supervised, and one without has no block at all, so the model learns when to think, and no empty block is ever trained.
One rule holds for the whole data set, so that the saved template's generation prompt is the prompt of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from glassloop.config.config import DataConfig
from glassloop.data.bounded import bounded
from glassloop.data.chat_template import MessageOf, Parts, chat_parts
from glassloop.data.rows import IGNORE, Example, Row, Turn
from glassloop.data.tokens import Codec, Part, encode_rows, literal, make_codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Name = Literal["r1", "instruct", "chat"]
R1_MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
PREAMBLE = "Write a response that answers the question below."
THINK_FIRST = " Before you answer, think it through step by step, so that the answer is sound."
INSTRUCTION = "You know the field of the question well. Answer it."


@dataclass(frozen=True)
class Template:
    """How conversations of one run become tokens."""

    name: Name
    codec: Codec
    parts: Parts
    message: MessageOf
    opens_think: bool  # the generation prompt ends in an open think block
    labels: Literal["response", "everything"]
    chat_template: str
    """Jinja template to save with the adapter: its generation prompt gives the ids of `prompt_ids` for text without control
    tokens."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer; every row that is not cut ends in one, supervised."""
    why: str = ""
    """Reason of data.template=auto for this one; empty if it was named."""

    def encode(self, example: Example) -> Row:
        """The whole conversation, never cut. Raises ValueError for a conversation that the template cannot write."""
        return self.encode_many([example])[0]

    def encode_many(self, examples: Sequence[Example]) -> list[Row]:
        """`encode` of each, faster."""
        parts = [self._parts(example, example.turns, False) for example in examples]
        encoded = encode_rows(self.codec, parts, [example.row_id for example in examples])
        rows = []
        for example, (ids, supervised) in zip(examples, encoded, strict=True):
            flags = [True] * len(ids) if self.labels == "everything" else supervised
            rows.append(Row(example.row_id, tuple(ids), (False, *flags[1:])))
        return rows

    def prompt_ids(self, example: Example) -> list[int]:
        """What the model is given to write the last assistant turn: all before it and the generation prompt. A prefix of
        `encode`'s ids."""
        parts = self._parts(example, _before_answer(example.turns), True)
        return encode_rows(self.codec, [parts], [example.row_id])[0][0]

    def messages(self, example: Example) -> list[dict[str, str]]:
        """The conversation as `apply_chat_template` takes it."""
        return [self.message(turn) for turn in example.turns]

    def _parts(
        self, example: Example, turns: Sequence[Turn], generation_prompt: bool
    ) -> list[Part]:
        try:
            return self.parts(turns, generation_prompt)
        except ValueError as error:
            raise ValueError(f"row {example.row_id}: {error}") from error


def make_template(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Template:
    """The template that `data` names, for the rows of a run. `examples`: all of them, held-out ones too; they decide about
    think tags.

    Checked before it is returned: on probe conversations, the saved chat template gives the ids that training gives. Raises
    ValueError where the tokenizer lacks what the template needs.
    """
    answers = [turn for example in examples for turn in example.turns if turn.role == "assistant"]
    opens_think = all(turn.reasoning is not None for turn in answers)
    codec = make_codec(tokenizer)
    name, why = template_for(tokenizer, codec) if data.template == "auto" else (data.template, "")
    if name == "chat":
        parts, message, source, stop_ids = chat_parts(codec, tokenizer)
        template = Template("chat", codec, parts, message, False, data.labels, source, stop_ids)
    elif name == "r1":
        missing = [mark for mark in R1_MARKS if mark not in codec.control]
        wanted = ", ".join(missing) or "to begin with"
        if missing or codec.begin is None:
            raise ValueError(
                f"data.template = r1: the tokenizer of {tokenizer.name_or_path} has no token {wanted}; set data.template=chat"
            )
        parts, source = _r1(codec, codec.begin, opens_think), _r1_source(opens_think)
        template = Template(
            "r1", codec, parts, _message("\n\n"), opens_think, data.labels, source, (codec.end,)
        )
    else:
        parts, source = _instruct(codec, opens_think), _instruct_source(codec, opens_think)
        template = Template(
            "instruct", codec, parts, _message("\n"), opens_think, data.labels, source, (codec.end,)
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
    """The row if it has at most `max_tokens`; else None ("drop"), or its first `max_tokens` ("cut", `truncated`, without its
    end token).

    None too where nothing supervised would be left: such a row teaches nothing.
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
    """The label shift, done here and nowhere else: place t gets the token that follows, if that one is supervised, else
    IGNORE."""
    following = zip(row.input_ids[1:], row.supervised[1:], strict=True)
    return [token if supervised else IGNORE for token, supervised in following] + [IGNORE]


def _before_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def _answer(codec: Codec, turn: Turn, opens_think: bool, join: str) -> list[Part]:
    """Reasoning in its tags, if there is any, and the answer; all supervised but the `<think>` that the prompt has written
    already."""
    if turn.reasoning is None:
        if opens_think:
            raise ValueError(
                "an assistant turn has no reasoning, but the prompt opens <think>: give make_template all rows of the run"
            )
        return [(turn.content.strip(), True)]
    opened = [] if opens_think else literal(codec, "<think>\n", True)
    closed = [("\n", True), *literal(codec, "</think>", True), (join + turn.content.strip(), True)]
    return [*opened, (turn.reasoning.strip(), True), *closed]


def _message(join: str) -> MessageOf:
    """Messages with reasoning within the content, stripped as in training; `join` stands between </think> and the answer."""

    def message(turn: Turn) -> dict[str, str]:
        content = turn.content.strip() if turn.role == "assistant" else turn.content
        if turn.reasoning is not None:
            content = f"<think>\n{turn.reasoning.strip()}\n</think>{join}{content}"
        return {"role": turn.role, "content": content}

    return message


def _r1(codec: Codec, begin: int, opens_think: bool) -> Parts:
    prompt = literal(codec, "<｜Assistant｜><think>\n" if opens_think else "<｜Assistant｜>")

    def parts(turns: Sequence[Turn], generation_prompt: bool) -> list[Part]:
        result: list[Part] = [(begin, False)]
        for turn in turns:
            if turn.role == "assistant":
                result += [*prompt, *_answer(codec, turn, opens_think, "\n\n"), (codec.end, True)]
            else:
                result += [
                    *(literal(codec, "<｜User｜>") if turn.role == "user" else []),
                    (turn.content, False),
                ]
        return result + (prompt if generation_prompt else [])

    return parts


def _r1_source(opens_think: bool) -> str:
    prompt = "<｜Assistant｜>" + (r"<think>\n" if opens_think else "")
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('This template has no role ' + message['role']) }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )


def _instruct(codec: Codec, opens_think: bool) -> Parts:
    begin: list[Part] = [] if codec.begin is None else [(codec.begin, False)]

    def parts(turns: Sequence[Turn], generation_prompt: bool) -> list[Part]:
        roles = [turn.role for turn in turns]
        system = turns[0].content if roles[:1] == ["system"] else INSTRUCTION
        asked = roles[1:] if roles[:1] == ["system"] else roles
        if asked != (["user"] if generation_prompt else ["user", "assistant"]):
            raise ValueError(
                f"data.template = instruct writes a question and its answer, not {', '.join(roles)}; set data.template=r1 or chat"
            )
        question = turns[len(roles) - len(asked)].content
        preamble = PREAMBLE + (THINK_FIRST if opens_think else "")
        prompt: list[Part] = [
            (
                f"{preamble}\n\n### Instruction:\n{system}\n\n### Question:\n{question}\n\n### Response:\n",
                False,
            )
        ]
        if opens_think:
            prompt += literal(codec, "<think>")
        if generation_prompt:
            return begin + prompt
        answer = _answer(codec, turns[-1], opens_think, "\n")
        return (
            begin + prompt + ([("\n", True)] if opens_think else []) + answer + [(codec.end, True)]
        )

    return parts


def _instruct_source(codec: Codec, opens_think: bool) -> str:
    preamble = PREAMBLE + (THINK_FIRST if opens_think else "")
    think = "<think>" if opens_think else ""
    return (
        ("" if codec.begin is None else "{{ bos_token }}")
        + "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set asked = messages[1:] %}"
        + "{% else %}{% set system = '"
        + INSTRUCTION
        + "' %}{% set asked = messages %}{% endif %}"
        + "{% if asked | length > 2 %}{{ raise_exception('This template has one question and one answer') }}{% endif %}"
        + "{{ '"
        + preamble
        + r"\n\n### Instruction:\n' + system + '\n\n### Question:\n' + asked[0]['content'] + '\n\n### Response:\n' }}"
        + "{% if asked | length > 1 %}{{ asked[1]['content'] + eos_token }}"
        + "{% elif add_generation_prompt %}{{ '"
        + think
        + "' }}{% endif %}"
    )


def _check(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    thinks: bool,
) -> None:
    """Holds a new template to its promises on probe conversations of the kinds that `examples` has; raises ValueError."""
    answer = Turn("assistant", "It has eight.", "A spider is an arachnid." if thinks else None)
    asked = (Turn("user", "How many legs has a spider?"), answer)
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
        probes.append(Example(several.row_id, (*asked, Turn("user", "And a bee?"), answer)))
    for probe in probes:
        row, prompt = template.encode(probe), template.prompt_ids(probe)
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
                f"data.template = {template.name}: with the tokenizer of {tokenizer.name_or_path} generation would not get "
                f"the tokens of training (saved template {saved[-12:]}, prompt {prompt[-12:]}, row {row.input_ids[-12:]}); "
                "choose another data.template"
            )
