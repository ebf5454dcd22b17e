"""Templates of the form that families publish: rows, reasoning, and the prompt of generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from family_templates import FORMS, tokenizer_of
from toys import ANSWER, QUESTION, REASONING, THOUGHT, TWO, UNTHOUGHT, saved_prompt, spans, talk

from glassloop.config import DataConfig
from glassloop.data.rows import Example
from glassloop.data.templates import Template, make_template

SYSTEM = talk(("system", "Be brief."), ("user", QUESTION), ("assistant", ANSWER))
PLAIN = talk(("user", QUESTION), ("assistant", ANSWER), ("user", "A bee?"), ("assistant", "Six."))
KEEPS = ("qwen3", "smollm3", "phi4", "granite", "mistral", "gemma3", "glm4", "olmo")
EMPTY = "<think>\n\n</think>\n"


def template_of(name: str, example: Example, **data: object) -> Template:
    config = DataConfig.model_validate({"template": "chat", **data})
    return make_template(config, tokenizer_of(name), (example,))


@pytest.mark.parametrize("example", [UNTHOUGHT, SYSTEM, PLAIN], ids=["one", "system", "two"])
@pytest.mark.parametrize("name", FORMS)
def test_the_prompt_of_generation_is_what_training_saw_before_each_answer(name, example) -> None:
    tokenizer, template = tokenizer_of(name), template_of(name, example)
    row, end = template.encode(example), FORMS[name][4]
    answers = [turn.content for turn in example.turns if turn.role == "assistant"]
    for place, turn in enumerate(example.turns):
        if turn.role == "assistant":
            until = Example("train:0", example.turns[: place + 1])
            prompt = template.prompt_ids(until)
            assert list(row.input_ids[: len(prompt)]) == prompt
            assert saved_prompt(tokenizer, template, until) == prompt
    learned = [tokenizer.decode(span).removeprefix(f"{EMPTY}\n") for span in spans(row)]
    assert [text.replace(end, "").strip() for text in learned] == answers
    assert learned[-1].endswith(end)


@pytest.mark.parametrize("name", KEEPS)
def test_reasoning_of_the_last_answer_is_learned_once(name: str) -> None:
    tokenizer, template = tokenizer_of(name), template_of(name, THOUGHT)
    (learned,) = [tokenizer.decode(span) for span in spans(template.encode(THOUGHT))]
    assert learned.count(REASONING) == 1 and learned.count("</think>") == 1
    assert learned.startswith(f"<think>\n{REASONING}\n</think>")
    prompt = template.prompt_ids(THOUGHT)
    assert saved_prompt(tokenizer, template, THOUGHT) == prompt
    assert not tokenizer.decode(prompt).rstrip().endswith("<think>")


def test_qwen3_leaves_out_what_was_thought_before_the_last_question() -> None:
    tokenizer, template = tokenizer_of("qwen3"), template_of("qwen3", TWO)
    learned = [tokenizer.decode(span) for span in spans(template.encode(TWO))]
    assert learned == [
        f"{ANSWER}<|im_end|>",
        "<think>\nIt is an insect.\n</think>\n\nSix.<|im_end|>",
    ]
    assert template.drops_earlier and not template_of("phi4", TWO).drops_earlier
    prompt = template.prompt_ids(TWO)
    assert saved_prompt(tokenizer, template, TWO) == prompt
    assert REASONING not in tokenizer.decode(prompt)


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_without_thinking_the_empty_block_is_part_of_the_prompt(name: str) -> None:
    off = {"template_args": ["enable_thinking=false"]}
    tokenizer, template = tokenizer_of(name), template_of(name, UNTHOUGHT, **off)
    row, prompt = template.encode(UNTHOUGHT), template.prompt_ids(UNTHOUGHT)
    assert tokenizer.decode(prompt).rstrip("\n").endswith("<think>\n\n</think>")
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert saved_prompt(tokenizer, template, UNTHOUGHT) == prompt
    (learned,) = [tokenizer.decode(span) for span in spans(row)]
    assert learned == f"{ANSWER}<|im_end|>"


def test_an_answer_of_glm_stops_where_the_next_question_would_begin() -> None:
    """Its rows end in the end token; both stop generation."""
    template = template_of("glm4", PLAIN)
    names = tokenizer_of("glm4").convert_ids_to_tokens(list(template.stop_ids))
    assert "<|endoftext|>" in names


@pytest.mark.parametrize("labels", ["response", "last"])
def test_a_run_says_that_reasoning_is_left_out(
    run_of, tmp_path: Path, tiny_llama: Path, labels: str
) -> None:
    shutil.copytree(tiny_llama, model := tmp_path / "model")
    source = (model / "chat_template.jinja").read_text()
    earlier = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    (model / "chat_template.jinja").write_text(source.replace("message['content']", earlier))
    said = ["Who?", "<think>\nA man.\n</think>\n\nHe.", "Why?", "<think>\nOf it.\n</think>\n\nSo."]
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, said, strict=True)
    ]
    rows = tmp_path / "two.jsonl"
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 16)
    run = run_of(model={"id": str(model)}, data={"source": str(rows), "labels": labels})
    (line,) = [line for line in run.header if "leaves out the reasoning" in line]
    assert ("data.labels=last learns the last" in line) == (labels == "response")
    run.close()
    plain = run_of(data={"source": str(rows), "labels": labels})
    assert not any("leaves out the reasoning" in line for line in plain.header)
    plain.close()
