"""vLLM's and Ollama's prompt of a merge is the prompt of training."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from go_template import render
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data.rows import Example, Turn
from glassloop.data.templates import make_template
from glassloop.use.merge.folder import adds_bos, generation_config
from glassloop.use.merge.modelfile import modelfile, pieces_of, quoted
from glassloop.use.merge.serve import commands, request, vllm_adapter, vllm_merged

R1 = Path(__file__).resolve().parents[4] / "shared" / "model" / "deepseek-r1-distill-llama-8b"
ANSWER = "It is a scam."


def r1_tokenizer():
    if not (R1 / "tokenizer.json").is_file():
        pytest.skip("the R1 tokenizer is not on this machine")
    marks = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(R1 / "tokenizer.json"), **marks)


def template_text(text: str) -> str:
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL).group(1)  # type: ignore[union-attr]


CASES = {
    "chat": ("tiny", "chat", None),
    "chat with a system prompt": ("tiny", "chat", "Be brief."),
    "r1, reasoning": ("r1", "r1", None),
    "r1, reasoning, system": ("r1", "r1", "Be brief."),
    "r1 without reasoning": ("r1", "r1 plain", None),
    "instruct": ("r1", "instruct", None),
    "instruct with a system prompt": ("tiny", "instruct plain", "Be brief."),
}


@pytest.mark.parametrize(("which", "name", "system"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("bos_by_server", [False, True])
def test_ollama_and_vllm_get_the_prompt_of_training(
    which, name, system, bos_by_server, tiny_tokenizer
):
    tokenizer = tiny_tokenizer if which == "tiny" else r1_tokenizer()
    reasoning = None if "plain" in name or name == "chat" else "Look at who calls."
    asked = [
        *([Turn("system", system)] if system else []),
        Turn("user", 'Is this a {{ "scam" }}?\nSay so.'),
    ]
    example = Example("r", (*asked, Turn("assistant", ANSWER, reasoning)))
    template = make_template(DataConfig(template=name.split()[0]), tokenizer, [example])  # type: ignore[arg-type]
    training = template.prompt_ids(example)
    tokenizer = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
    )
    tokenizer.chat_template = template.chat_template
    messages = template.messages(example)[:-1]
    vllm = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert vllm == training
    text = modelfile(
        tokenizer,
        {"eos_token_id": template.stop_ids[0]},
        adds_bos=bos_by_server,
        source=".",
        context=4096,
    )
    written = render(template_text(text), messages)
    begin = (
        [tokenizer.bos_token_id] if bos_by_server and training[0] == tokenizer.bos_token_id else []
    )
    assert [*begin, *tokenizer(written, add_special_tokens=False)["input_ids"]] == training
    assert training.count(tokenizer.bos_token_id) == (
        1 if training[0] == tokenizer.bos_token_id else 0
    )


def test_a_conversation_is_written_as_in_training(tiny_tokenizer):
    turns = (
        Turn("user", "One?"),
        Turn("assistant", "1"),
        Turn("user", "Two?"),
        Turn("assistant", "2"),
    )
    template = make_template(DataConfig(template="chat"), tiny_tokenizer, [Example("r", turns)])
    text = modelfile(tiny_tokenizer, {}, adds_bos=False, source=".", context=512)
    written = render(template_text(text), template.messages(Example("r", turns))[:-1])
    assert tiny_tokenizer(written, add_special_tokens=False)["input_ids"] == template.prompt_ids(
        Example("r", turns)
    )


def test_the_modelfile_has_stops_and_sampling(tiny_tokenizer):
    r1 = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 5]}
    text = modelfile(tiny_tokenizer, r1, adds_bos=False, source="./model.gguf", context=4096)
    assert text.splitlines()[0] == "FROM ./model.gguf"
    for line in (
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<|assistant|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
    ):
        assert line in text.splitlines()
    for neutral in (
        "PARAMETER top_k 0",
        "PARAMETER min_p 0",
        "PARAMETER repeat_penalty 1",
    ):  # or Ollama's own defaults would hold
        assert neutral in text.splitlines()
    greedy = modelfile(
        tiny_tokenizer,
        {"temperature": 0.6, "eos_token_id": 2},
        adds_bos=False,
        source=".",
        context=4096,
    )
    assert (
        "PARAMETER temperature 0\n" in greedy
        and "0.6" not in greedy
        and "PARAMETER repeat_penalty 1\n" in greedy
    )
    penalised = modelfile(
        tiny_tokenizer, {"repetition_penalty": 1.05}, adds_bos=False, source=".", context=4096
    )
    assert "PARAMETER repeat_penalty 1.05\n" in penalised
    asked = json.loads(shlex.split(request("mine", r1))[-1])
    assert (asked["temperature"], asked["top_p"]) == (0.6, 0.95)
    assert (
        json.loads(shlex.split(request("mine", {"temperature": 0.6}))[-1])["temperature"] == 0
    )  # vLLM's own default is 1
    assert "temperature" not in json.loads(shlex.split(request("mine", {"do_sample": True}))[-1])


def test_a_template_that_is_not_made_of_pieces_is_refused(tiny_tokenizer):
    odd = tiny_tokenizer.__class__(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, **tiny_tokenizer.special_tokens_map
    )
    odd.chat_template = "{% for m in messages %}{{ m['content'] }}{{ loop.index }}|{% endfor %}"
    with pytest.raises(ValueError, match="vLLM"):
        pieces_of(odd)
    assert (
        quoted("plain\n") == "plain\n"
        and render(quoted('a {{ "b" }} \\ c'), [{"role": "user", "content": ""}])
        == 'a {{ "b" }} \\ c'
    )


def test_generation_config_stops_where_training_stopped(tiny_tokenizer):
    template = make_template(
        DataConfig(template="chat"),
        tiny_tokenizer,
        [Example("r", (Turn("user", "q"), Turn("assistant", "a")))],
    )
    found = generation_config(
        {"temperature": 0.6, "do_sample": True, "eos_token_id": 5}, {}, template, tiny_tokenizer
    )
    assert (
        found["eos_token_id"] == [2, 5]
        and found["temperature"] == 0.6
        and found["pad_token_id"] == 0
    )
    assert not adds_bos(tiny_tokenizer)


def test_vllm_commands_name_folder_rank_and_template():
    words = shlex.split(vllm_merged("out", "mine", context=8192, opens_think=True))
    assert words[:3] == ["vllm", "serve", "out"] and words[-2:] == [
        "--reasoning-parser",
        "deepseek_r1",
    ]
    words = shlex.split(
        vllm_adapter(
            "owner/base",
            "abc",
            "runs/x/checkpoints/u",
            "mine",
            r=12,
            nf4=True,
            context=8192,
            opens_think=False,
        )
    )
    assert (
        words[words.index("--max-lora-rank") + 1] == "16" and "mine=runs/x/checkpoints/u" in words
    )
    assert words[words.index("--chat-template") + 1] == "runs/x/checkpoints/u/chat_template.jinja"
    with pytest.raises(ValueError, match=r"lora\.r = 600"):
        vllm_adapter("b", None, "a", "n", r=600, nf4=False, context=1, opens_think=False)
    assert (
        words[words.index("--quantization") + 1] == "bitsandbytes"
    )  # the base that it was trained on


def test_every_line_of_serve_runs_from_anywhere_and_none_stops_a_merge():
    given: dict[str, Any] = dict(
        base="o/b", revision=None, nf4=False, generation={}, context=64, opens_think=False
    )
    out, checkpoint = Path("/m/it's mine"), Path("/r/checkpoints/update_000002")
    lines = commands(out, checkpoint, r=8, trains_tokens=False, no_ollama=None, **given)
    merged, adapter, asked, ollama = (shlex.split(line) for line in lines[1::2])
    assert (
        merged[2] == str(out)
        and f"it's mine={checkpoint}" in adapter
        and "--quantization" not in adapter
    )
    assert json.loads(asked[-1])["model"] == "it's mine" and ollama[:2] == ["cd", str(out)]
    lines = commands(out, checkpoint, r=600, trains_tokens=False, no_ollama="because", **given)
    assert "lora.r = 600" in lines[3] and lines[-1] == "because"
