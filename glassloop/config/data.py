"""The section `data`: where rows come from and how they become tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from glassloop.config.sections import Section

# What a template is given of a conversation.
TEMPLATE_OWN = ("messages", "tools", "add_generation_prompt", "documents")


class Columns(Section):
    """Names of the source's columns.

    None: the format's own name, or a usual one for it.
    """

    question: str | None = None
    """Column with what the user asks."""
    input: str | None = None
    """Column with a text that the question is about; put below it."""
    reasoning: str | None = None
    """Column with the chain of thought."""
    response: str | None = None
    """Column with the answer."""
    system: str | None = None
    """Column with the system prompt."""
    history: str | None = None
    """Column with earlier turns, as pairs of question and answer."""
    messages: str | None = None
    """Column with a list of chat turns."""
    tools: str | None = None
    """Column with the tools that a conversation may call (a list, or its JSON)."""
    chosen: str | None = None
    """Column with the preferred answer (format chosen)."""
    text: str | None = None
    """Column with texts that are trained whole (format text)."""
    dialogue: str | None = None
    """Column with a phone call's text (format scam)."""
    type: str | None = None
    """Column with the kind of call (format scam)."""
    label: str | None = None
    """Column with 1 for a scam, 0 for an honest call (format scam)."""


class MixedSource(Section):
    """One source of data.mix."""

    source: str = Field(min_length=1)
    """As data.source."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch has each of its rows; of a fraction, a part of the rows."""
    split: str = "train"
    """As data.split."""
    rows: int | None = Field(default=None, ge=1)
    """As data.rows, before `weight` copies them."""


class DataConfig(Section):
    source: str = Field(default="BothBosu/scam-dialogue", min_length=1)
    """Rows: a csv, tsv, json, jsonl, parquet or arrow file (text also packed as .gz, .xz, .bz2 or
    .zst), several with commas or a pattern (rows/*.csv), a folder, a hub id (also id:split), or
    `sample` for glassloop's own rows."""
    mix: tuple[MixedSource, ...] = ()
    """Several sources in place of `source`: [{source: a.csv, weight: 2}, {source: b.jsonl}]."""
    config: str | None = None
    """Name of the data set's configuration on the hub (medical-o1 has `en`)."""
    split: str = "train"
    """Split that training rows come from; a part of it as train[:100] or train[10%:]."""
    revision: str | None = None
    """Hub commit, tag or branch of the data set."""
    format: Literal[
        "auto",
        "scam",
        "reasoning",
        "messages",
        "sharegpt",
        "prompt_completion",
        "alpaca",
        "question_answer",
        "chosen",
        "text",
    ] = "auto"
    """How a source's columns become turns. auto: decided from the column names, and printed.
    question_answer: by usual names. chosen: the preferred answers of a preference file. text:
    trained whole."""
    columns: Columns = Columns()
    """Names of columns where they differ from the format's own and the usual ones."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot train as they are: refused with their number, or left out and counted."""
    max_gib: float = Field(default=8.0, gt=0)
    """Most GiB that a source's rows may unpack to; larger ones are refused as they are read."""
    rows: int | None = Field(default=None, ge=1)
    """Rows taken after shuffling by `seed`; None: all."""
    shuffle: bool = True
    """Shuffle by `seed` before rows are taken. Sources are often sorted by class."""
    heldout: str | float | None = None
    """Rows never trained on: a split's name, a file, or a fraction in (0, 1) drawn by `seed`. None:
    no evaluation."""
    heldout_rows: int | None = Field(default=None, ge=1)
    """Held-out rows taken after shuffling by `seed`; None: all."""
    heldout_duplicates: Literal["refuse", "drop"] = "refuse"
    """Training rows that ask exactly what a held-out row asks: refused with their number, or left
    out of training and counted."""
    template: Literal["auto", "r1", "instruct", "chat"] = "auto"
    """r1: DeepSeek's chat format, reasoning kept. instruct: a plain text form. chat: the
    tokenizer's own. auto: r1 for DeepSeek-R1's tokenizers, else chat; instruct if there is no chat
    template."""
    template_args: tuple[str, ...] = ()
    """Arguments of the tokenizer's own chat template, as NAME=VALUE: enable_thinking=false. Also
    data.template_args.NAME=VALUE, and a mapping in YAML. They become part of the template that is
    saved."""
    system: str | None = None
    """System prompt put before every row that brings none."""
    system_turn: Literal["keep", "user", "drop"] = "keep"
    """Where a system prompt goes: a turn of its own; before the first question's text, for
    templates without such a turn (Gemma, Mistral); or left out. The last two are counted."""
    labels: Literal["response", "last", "everything"] = "response"
    """Tokens that carry loss: the assistant's turns (EOS included), the last of them, or all but
    BOS."""
    answer_tokens: tuple[str, ...] = ()
    """Control tokens that an answer or a whole text may use, such as <tool_call>. Row text that
    spells any other stays text."""
    scam_reasoning: Literal["cues", "none", "drop"] = "cues"
    """Think block of a scam row that brings no reasoning: its type's cues, or none. drop: no think
    block in any row, its own reasoning left out."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest row in tokens."""
    too_long: Literal["drop", "cut"] = "drop"
    """A longer row is dropped, or cut at `max_tokens` (then it teaches no EOS). Both are
    counted."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """A command line brings 0.1 as text."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    @field_validator("template_args", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        """YAML brings a mapping."""
        if not isinstance(value, Mapping):
            return value
        return tuple(f"{name}={json.dumps(one)}" for name, one in value.items())

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        template_values(self.template_args)
        if isinstance(self.heldout, float) and not 0 < self.heldout < 1:
            raise ValueError(
                f"data.heldout = {self.heldout}: a fraction must lie between 0 and 1 (for example "
                "0.1)"
            )
        if self.heldout_rows is not None and self.heldout is None:
            raise ValueError(
                f"data.heldout_rows = {self.heldout_rows} needs data.heldout: a split, a file or a "
                "fraction"
            )
        if self.mix and self.rows is not None:
            raise ValueError(
                f"data.rows = {self.rows}: with data.mix each source has `rows` of its own; "
                "set them there"
            )
        if self.system is not None and self.system_turn == "drop":
            raise ValueError(
                "data.system is given and data.system_turn = drop would leave it out: keep one"
            )
        return self


def items_of(text: str) -> Any:
    """Items of a list: by commas, or YAML.

    Items with fields need YAML ([{source: a.csv}]).
    """
    if "{" in text:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text  # pydantic refuses it, naming the field
    return [] if text in ("null", "[]", "") else text.strip("[]").split(",")


def template_values(args: Sequence[str]) -> dict[str, str | bool | int | float | None]:
    """Arguments by name; a value that is no JSON is text.

    Raises ValueError for one without a name, twice, or of more than one value.
    """
    found: dict[str, str | bool | int | float | None] = {}
    for one in args:
        name, equals, text = one.partition("=")
        if not equals or not name.isidentifier() or name in found or name in TEMPLATE_OWN:
            raise ValueError(
                f"data.template_args = {one}: write NAME=VALUE, once a name, and none of "
                f"{', '.join(TEMPLATE_OWN)}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, list | dict):
            raise ValueError(f"data.template_args.{name} = {text}: give a single value")
        found[name] = value
    return found
