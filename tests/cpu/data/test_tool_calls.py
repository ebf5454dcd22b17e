"""Tool calls under the tokenizer's own chat template."""

from __future__ import annotations

import json

import pytest
from toys import CHATML, marks_in, spans, toy
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data.rows import Example, RowFault, Turn
from glassloop.data.templates import make_template

TOOLS = CHATML.replace(
    "{% for m in messages %}",
    "{% if tools %}{{ '# Tools\n' + (tools | tojson) + '\n' }}{% endif %}{% for m in messages %}",
).replace(
    "m['content'] +",
    "(m['content'] or '') + ('<tool_call>' + (m.tool_calls[0].function | tojson) + '</tool_call>' "
    "if m.tool_calls else '') +",
)
WEATHER = {"name": "weather", "arguments": {"city": 'Oslo "N"'}}
WITHOUT_TOOLS = CHATML.replace("m['content'] +", "(m['content'] or '') +")
RAISES = TOOLS.replace("{% for m", "{{ raise_exception('no') if messages | length > 2 }}{% for m")
SPELLS = {"name": "weather", "arguments": {"a": ["</tool_call><|im_end|>"]}}
OFFERED = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'


def tool_talk(call: dict[str, object], content: str = "") -> Example:
    extra = json.dumps({"tool_calls": [{"type": "function", "function": call}]})
    return Example(
        "train:0",
        (
            Turn("user", "Rain?"),
            Turn("assistant", content, extra=extra),
            Turn("tool", "<tool_call>no"),
            Turn("assistant", "No."),
        ),
        tools=OFFERED,
    )


def tool_tokenizer(source: str) -> PreTrainedTokenizerFast:
    marks = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    return toy(marks, bos=None, eos="<|im_end|>", template=source)


@pytest.mark.parametrize("content", ["", "Let me look."])
def test_tool_calls_are_written_by_the_tokenizers_template_and_learned(content: str) -> None:
    tokenizer, conversation = tool_tokenizer(TOOLS), tool_talk(WEATHER, content)
    template = make_template(DataConfig(template="chat"), tokenizer, (conversation,))
    row = template.encode(conversation)
    assert template.writes_tools
    own = tokenizer.apply_chat_template(
        template.messages(conversation), tools=json.loads(OFFERED), tokenize=False
    )
    assert tokenizer.decode(row.input_ids) + "\n" == own
    call = f"{content}<tool_call>{json.dumps(WEATHER)}</tool_call><|im_end|>"
    assert [tokenizer.decode(span) for span in spans(row)] == [call, "No.<|im_end|>"]
    assert marks_in(tokenizer, row).count("<tool_call>") == 1  # the result's text stays text
    prompt = template.prompt_ids(conversation)
    assert list(row.input_ids[: len(prompt)]) == prompt


@pytest.mark.parametrize(
    ("source", "call", "kind", "match"),
    [
        (WITHOUT_TOOLS, WEATHER, "tool calls", "writes no tool calls; leave"),
        (TOOLS, SPELLS, "control token in a tool call", "spells the control token </tool_call>"),
        (RAISES, WEATHER, "refused by the chat template", "refuses turns user, assistant"),
    ],
    ids=["knows none", "control token", "raises"],
)
def test_tool_calls_that_cannot_be_written_are_faults(
    source: str, call: dict[str, object], kind: str, match: str
) -> None:
    tokenizer, conversation = tool_tokenizer(source), tool_talk(call)
    template = make_template(DataConfig(template="chat"), tokenizer, (conversation,))
    (fault,) = template.try_encode([conversation])
    assert isinstance(fault, RowFault)
    assert fault.kind == kind
    with pytest.raises(ValueError, match=f"row train:0: .*{match}"):
        template.encode(conversation)
