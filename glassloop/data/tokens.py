"""Token ids of text, with rows' text kept apart from control tokens.

A row's text is encoded by a copy of the tokenizer that knows no added token, so `<｜Assistant｜>`,
`<think>` or an end-of-text mark in a row stays text. (`split_special_tokens=True` is not enough:
some of them are added tokens that do not count as special.) Control tokens come from templates, as
ids, and from answers if `data.answer_tokens` names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from glassloop.data.names import listed
from glassloop.data.rows import RowFault

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# A control token's id or a piece of text, and whether it is supervised.
Part = tuple[int | str, bool]


@dataclass(frozen=True)
class Codec:
    """A tokenizer split into plain text and control tokens.

    Two copies of the plain one, since some tokenizers put a space before text, and must not do so
    within a text.
    """

    opening: Tokenizer  # for text at the start of a row or behind a control token
    within: Tokenizer  # for text that goes on where the supervised part begins or ends
    control: dict[str, int]  # added tokens by their text, those of mere whitespace left out
    pattern: re.Pattern[str]  # finds them, the longest first
    in_answers: re.Pattern[str]  # finds those that an answer may use
    never_text: frozenset[int]  # ids that no text may turn into
    begin: int | None  # BOS; None if the tokenizer has none
    end: int  # EOS

    def control_of(self, match: re.Match[str]) -> int:
        """Return the id of the control token that `pattern` or `in_answers` found."""
        return self.control[match.group(match.lastindex or 0)]

    def spelled(self, text: str) -> set[str]:
        """Control tokens whose spelling stands in the text of a row."""
        if self.openings.isdisjoint(text):
            return set()
        return {match.group(match.lastindex or 0) for match in self.pattern.finditer(text)}

    @cached_property
    def openings(self) -> frozenset[str]:
        """First characters of control tokens."""
        return frozenset(text[0] for text in self.control)


def make_codec(tokenizer: PreTrainedTokenizerBase, answer_tokens: tuple[str, ...] = ()) -> Codec:
    """Split a tokenizer. `answer_tokens`: control tokens that answers may use.

    Raises ValueError for a tokenizer without a `tokenizers` backend or without EOS, one that makes
    control tokens of plain text, and an answer token that it lacks.
    """
    name = tokenizer.name_or_path
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"model.id = {name}: {type(tokenizer).__name__} is no fast tokenizer; convert it to a "
            "tokenizer.json"
        )
    begin, end, unknown = (
        cast("int | None", getattr(tokenizer, f"{what}_token_id")) for what in ("bos", "eos", "unk")
    )
    if end is None:
        raise ValueError(
            f"model.id = {name}: its tokenizer has no end token, so no answer could end; choose a "
            "model that has one"
        )
    written = _without_vocabulary(backend)
    added = {token["content"]: token for token in written["added_tokens"]}
    # Runs of spaces or line breaks steer nothing, and the model knows them as text: they stay.
    blank = {
        text for text, token in added.items() if not token["special"] and not text.strip(" \t\n\r▁")
    }
    control = {text: token["id"] for text, token in added.items() if text not in blank}
    steps = {where: _steps(written, within=where) for where in (False, True)}
    opening = _plain(backend, written, blank, steps[False])
    same = steps[True] == steps[False]
    within = opening if same else _plain(backend, written, blank, steps[True])
    missing = [text for text in answer_tokens if text not in control]
    if missing:
        raise ValueError(
            f"data.answer_tokens = {listed(missing)}: the tokenizer of {name} has no such control "
            f"token; it has {listed(list(control))}"
        )
    never_text = frozenset(control.values()) - ({unknown} - {begin, end})
    for text, token in control.items():
        if token in never_text and token in opening.encode(text, add_special_tokens=False).ids:
            raise ValueError(
                f"model.id = {name}: its tokenizer turns the plain text {text!r} into control "
                f"token {token}, so rows could not be told from a conversation's marks; choose a "
                "model with a byte-level tokenizer"
            )
    pattern, in_answers = _pattern(added, control), _pattern(added, answer_tokens)
    return Codec(opening, within, control, pattern, in_answers, never_text, begin, end)


def _pattern(added: dict[str, Any], tokens: Iterable[str]) -> re.Pattern[str]:
    """Pattern of tokens' spelling, the longest first, with whitespace they swallow."""
    ordered = sorted(tokens, key=len, reverse=True)
    if not ordered:
        return re.compile(r"(?!)")
    pattern = "|".join(
        r"\s*" * added[t]["lstrip"] + f"({re.escape(t)})" + r"\s*" * added[t]["rstrip"]
        for t in ordered
    )
    # At most places of a text none begins, and to try hundreds there takes long.
    first = "".join(re.escape(one) for one in sorted({t[0] for t in ordered}))
    return re.compile(rf"(?=\s*[{first}])(?:{pattern})")


def _without_vocabulary(backend: Tokenizer) -> dict[str, Any]:
    """A tokenizer's steps and added tokens, as its file has them.

    To write and read the vocabulary too would take a second.
    """
    from tokenizers import Tokenizer, models

    small = Tokenizer(models.BPE())
    for step in ("normalizer", "pre_tokenizer"):
        if getattr(backend, step) is not None:
            setattr(small, step, getattr(backend, step))
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = [
        {"id": number} | {field: getattr(token, field) for field in fields}
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    ]
    written: dict[str, Any] = json.loads(small.to_str())
    return written | {"added_tokens": added}


def _plain(
    backend: Tokenizer, written: dict[str, Any], keep: set[str], steps: dict[str, Any]
) -> Tokenizer:
    """Copy the tokenizer without control tokens, with other `steps` before its model.

    The copy reads the same vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer

    copy = Tokenizer(backend.model)
    before = Tokenizer.from_str(json.dumps(written | {"added_tokens": []} | steps))
    for step in ("normalizer", "pre_tokenizer"):
        if getattr(before, step) is not None:
            setattr(copy, step, getattr(before, step))
    kept = {t["content"]: dict(t) for t in written["added_tokens"] if t["content"] in keep}
    numbers = {text: token.pop("id") for text, token in kept.items()}
    copy.add_tokens([AddedToken(**token) for token in kept.values()])
    moved = [text for text, number in numbers.items() if copy.token_to_id(text) != number]
    if moved:  # they are numbered behind a control token that is gone
        raise ValueError(
            f"the tokenizer's whitespace tokens {moved} cannot be told from its control tokens; "
            "choose another model"
        )
    return copy


def _steps(written: dict[str, Any], *, within: bool) -> dict[str, Any]:
    normalizer = written["normalizer"]
    return {
        "normalizer": _without_prepend(normalizer) if within else normalizer,
        "pre_tokenizer": _without_prefix(written["pre_tokenizer"], within),
    }


def _without_prefix(step: dict[str, Any] | None, within: bool) -> dict[str, Any] | None:
    """A pre-tokenizer step that puts no space before text.

    `within`: never; else only the space that every piece of text gets.
    """
    if step is None:
        return None
    step = dict(step)
    if "pretokenizers" in step:
        step["pretokenizers"] = [_without_prefix(inner, within) for inner in step["pretokenizers"]]
    if step.get("prepend_scheme") == "first" or (within and "prepend_scheme" in step):
        step["prepend_scheme"] = "never"  # "first" speaks of the start of a row, where BOS stands
    if within and "add_prefix_space" in step:
        step["add_prefix_space"] = False
    return step


def _without_prepend(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if "normalizers" in step:
        inner = [kept for one in step["normalizers"] if (kept := _without_prepend(one)) is not None]
        return dict(step, normalizers=inner)
    return step


def literal(codec: Codec, text: str, supervised: bool = False) -> list[Part]:
    """Text that a template wrote, with its control tokens as ids."""
    return _split(codec, codec.pattern, text, supervised)


def answer(codec: Codec, text: str, supervised: bool) -> list[Part]:
    """Text of an answer, with the tokens of data.answer_tokens as ids."""
    return _split(codec, codec.in_answers, text, supervised)


def _split(codec: Codec, pattern: re.Pattern[str], text: str, supervised: bool) -> list[Part]:
    parts: list[Part] = []
    end = 0
    for match in pattern.finditer(text):
        parts += [(text[end : match.start()], supervised), (codec.control_of(match), supervised)]
        end = match.end()
    return [*parts, (text[end:], supervised)]


def encode_rows(
    codec: Codec, rows: Sequence[Sequence[Part]], row_ids: Sequence[str]
) -> list[tuple[list[int], list[bool]] | RowFault]:
    """Encode each row of parts as ids and supervision.

    A row whose text gives control tokens gets a fault in its place.

    Neighbouring text with equal supervision is joined first, so it is encoded as one text; where
    supervision changes, tokens end.
    """
    texts: dict[bool, list[str]] = {False: [], True: []}  # within -> texts, in order
    joined = [_join(parts) for parts in rows]
    for parts in joined:
        for place, (part, _) in enumerate(parts):
            if isinstance(part, str):
                texts[_is_within(parts, place)].append(part)
    encoded = {
        False: iter(codec.opening.encode_batch_fast(texts[False], add_special_tokens=False)),
        True: iter(codec.within.encode_batch_fast(texts[True], add_special_tokens=False)),
    }
    result: list[tuple[list[int], list[bool]] | RowFault] = []
    for parts, row_id in zip(joined, row_ids, strict=True):
        ids: list[int] = []
        supervised: list[bool] = []
        controls: set[int] = set()
        for place, (part, flag) in enumerate(parts):
            new = [part] if isinstance(part, int) else next(encoded[_is_within(parts, place)]).ids
            if isinstance(part, str):
                controls |= codec.never_text.intersection(new)
            ids += new
            supervised += [flag] * len(new)
        fault = f"row {row_id}: its text turns into control tokens {controls}; leave the row out"
        result.append(RowFault("control tokens", fault) if controls else (ids, supervised))
    return result


def _join(parts: Sequence[Part]) -> list[Part]:
    joined: list[Part] = []
    for part, flag in parts:
        if (
            isinstance(part, str)
            and joined
            and isinstance(joined[-1][0], str)
            and joined[-1][1] == flag
        ):
            joined[-1] = (joined[-1][0] + part, flag)
        elif part != "":
            joined.append((part, flag))
    return joined


def _is_within(parts: Sequence[Part], place: int) -> bool:
    return place > 0 and isinstance(parts[place - 1][0], str)
