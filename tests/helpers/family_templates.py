"""Chat templates of the form that families publish; sentences are our own."""

from __future__ import annotations

from toys import toy
from transformers import PreTrainedTokenizerFast

IM = "<|im_start|>"
GENERATE = "{% if add_generation_prompt %}"
# Reasoning comes apart or inside the content; of earlier questions it is left out, and the last
# answer has a block in any case.
QWEN3 = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is defined and m.reasoning_content is not none %}"
    "{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    + GENERATE
    + "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles take turns') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    + GENERATE
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}" + GENERATE + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Be of use."
    "<|end_of_text|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}" + GENERATE + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# Without thinking every answer and the prompt begin with an empty block.
SMOLLM3 = (
    "{% set thinks = enable_thinking is not defined or enable_thinking %}"
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\nMode: '"
    " + ('/think' if thinks else '/no_think') + '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n')"
    " + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    + GENERATE
    + "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') }}{% endif %}"
)
# No token ends an answer: the next question's mark does.
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% endfor %}" + GENERATE + "{{ '<|assistant|>\n' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}{% else %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
    + GENERATE
    + "{{ '<|assistant|>\n' }}{% endif %}"
)
# name -> template, marks, bos, eos, what ends an answer
FORMS: dict[str, tuple[str, tuple[str, ...], str | None, str, str]] = {
    "qwen3": (QWEN3, (IM, "<|im_end|>", "<think>", "</think>"), None, "<|im_end|>", "<|im_end|>"),
    "gemma3": (
        *(GEMMA3, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
        "<end_of_turn>",
    ),
    "mistral": (
        *(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
        *("<s>", "</s>", "</s>"),
    ),
    "phi4": (
        *(PHI4, (IM, "<|im_sep|>", "<|im_end|>", "<|endoftext|>"), None, "<|endoftext|>"),
        "<|im_end|>",
    ),
    "granite": (
        *(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), None),
        *("<|end_of_text|>", "<|end_of_text|>"),
    ),
    "smollm3": (
        *(SMOLLM3, (IM, "<|im_end|>", "<think>", "</think>"), None, "<|im_end|>", "<|im_end|>"),
    ),
    "glm4": (
        *(GLM4, ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")),
        *(None, "<|endoftext|>", "<|endoftext|>"),
    ),
    "olmo": (
        *(OLMO, ("<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"), "<|endoftext|>"),
        *("<|endoftext|>", "<|endoftext|>"),
    ),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    template, marks, bos, eos, _ = FORMS[name]
    return toy(marks, bos=bos, eos=eos, template=template)
