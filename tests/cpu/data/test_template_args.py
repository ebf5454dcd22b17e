"""Arguments of a chat template: data.template_args.enable_thinking=false."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import TWO, UNTHOUGHT, chatml, saved_prompt

from glassloop.config import DataConfig
from glassloop.config.arguments import ConfigError, from_values, parse
from glassloop.data.templates import make_template

# As Qwen3's: the last answer begins with a think block, and so does a prompt without thinking.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OFF = "data.template_args.enable_thinking=false"


def test_the_prompt_has_what_the_argument_writes_and_the_saved_template_brings_it() -> None:
    tokenizer = chatml(THINKING)
    plain = make_template(DataConfig(template="chat"), tokenizer, (UNTHOUGHT,))
    off = parse(["data.template=chat", OFF]).data
    template = make_template(off, tokenizer, (UNTHOUGHT,))
    row, prompt = template.encode(UNTHOUGHT), template.prompt_ids(UNTHOUGHT)
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(plain.prompt_ids(UNTHOUGHT)).endswith("assistant\n")
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert saved_prompt(tokenizer, template, UNTHOUGHT) == prompt  # without the argument
    assert row.input_ids == plain.encode(UNTHOUGHT).input_ids
    assert sum(row.supervised) < sum(plain.encode(UNTHOUGHT).supervised)  # the block is prompt


def test_command_line_and_yaml_say_the_same() -> None:
    one = parse([OFF, "--data.template_args.level=3", "data.template_args.style=short"])
    two = from_values(
        {"data": {"template_args": {"enable_thinking": False, "level": 3, "style": "short"}}}
    )
    assert one.data.template_args[:2] == two.data.template_args[:2]
    again = from_values({"data": {"template_args": list(one.data.template_args)}})
    assert again.data == one.data


@pytest.mark.parametrize(
    "word",
    ["messages=1", "two words=1", "enable_thinking", "a=[1]", "a={}"],
)
def test_a_word_that_is_no_argument_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.template_args"):
        from_values({"data": {"template_args": [word]}})


def test_the_same_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="once a name"):
        parse([OFF, "data.template_args.enable_thinking=true"])


def test_an_argument_that_the_template_does_not_read_is_refused() -> None:
    data = DataConfig(template="chat", template_args=("enable_thinkin=false",))
    with pytest.raises(ValueError, match=r"data\.template_args\.enable_thinkin: .*reads no such"):
        make_template(data, chatml(THINKING), (UNTHOUGHT,))


def test_arguments_are_for_the_tokenizer_s_own_template_alone() -> None:
    data = DataConfig(template="instruct", template_args=("enable_thinking=false",))
    with pytest.raises(ValueError, match=r"data\.template is instruct.*set data\.template=chat"):
        make_template(data, chatml(THINKING), (TWO,))


def test_none_and_text_are_written_as_jinja_has_them() -> None:
    source = THINKING + "{% if style == 'a \"b\" é' and level is none %}{{ '' }}{% endif %}"
    args = ("level=null", 'style=a "b" é')
    data = DataConfig(template="chat", template_args=args)
    template = make_template(data, chatml(source), (UNTHOUGHT,))
    assert template.chat_template.startswith("{% set level = none %}{% set style = ")


def test_a_run_records_them(run_of, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="reads no such argument"):
        run_of(data={"template_args": {"enable_thinking": False}})
