"""Greedy answers in the middle of training, and the guard that leaves no trace of them.

Legend: B rows, T tokens of the longest prompt, A tokens of an answer.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

ROTARY_STATE = (
    "inv_freq",
    "max_seq_len_cached",
    "attention_scaling",
)  # "dynamic" rotary tables grow with the longest row seen

Autocast = Callable[[], AbstractContextManager]


@contextlib.contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all that an update depends on is as before.

    Each module's mode, each parameter's requires_grad (PEFT's disable_adapter() clears it and then sets it for all it has) and
    the rotary tables are put back; random numbers must not have been drawn.

    no_grad, not inference_mode: what a module makes in here and keeps (a table, a quantisation state) would be an inference
    tensor, and autograd refuses to save one in the next update. Next to the kernels the difference in time is nothing.
    """
    repacking = [
        m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False) and _on_cpu(m)
    ]
    assert not repacking, (
        f"a pass without gradients would repack {len(repacking)} 4-bit layers for inference, and later updates would lose part "
        "of their gradient: set support_avx512bf16_for_cpu = False on each when the model is loaded"
    )
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    tables = [(m, name, getattr(m, name)) for m in model.modules() for name in _rotary_names(m)]
    random_state = _random_state(device)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training
        for p, wants_grad in flags:
            p.requires_grad_(wants_grad)
        for m, name, value in tables:
            setattr(m, name, value)
    assert _random_state(device) == random_state, (
        "evaluation drew random numbers: later dropout masks would be others"
    )


def generate(
    hf: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
    autocast: Autocast = nullcontext,
    processors: Callable[[int, int], Sequence[Any]] = lambda _first, _count: (),
    streamer: Any = None,
) -> list[tuple[int, ...]]:
    """The most likely token at each place, up to one of `stop_ids` (kept) or `max_new_tokens`. This rank only, no collective.

    The model's own generation settings are laid aside: a checkpoint may ask for sampling or a repetition penalty, and an explicit
    config takes from the model's what it leaves open. The cache works because `unchanged` sets evaluation mode: in training mode
    transformers drops it under activation checkpointing, and each new token sees nothing of what stands before it.

    Args:
        hf: a PEFT model; its adapters take part unless the caller disabled them.
        pad_id: fills the left of shorter prompts. It may be one of `stop_ids`.
        processors: (number of a batch's first prompt, its prompts) -> transformers' logits processors, for what the most likely token
            is to be chosen from; see answering.py for one that samples.
        streamer: gets each batch's prompt ids, then each step's new ids (B,), as transformers' streamers do.

    Returns:
        One tuple of new ids a prompt. An answer is shorter than asked where the model has no more positions for it.
    """
    from transformers import GenerationConfig

    model = hf.get_base_model()
    settings, positions = (
        model.generation_config,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    answers: list[tuple[int, ...]] = []
    try:
        with unchanged(hf, device), autocast():
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                width = max(len(prompt) for prompt in batch)
                room = (
                    max_new_tokens
                    if positions is None or width >= positions
                    else min(max_new_tokens, positions - width)
                )
                model.generation_config = GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=room,
                    eos_token_id=list(stop_ids) or None,
                    pad_token_id=pad_id,
                    use_cache=True,
                    disable_compile=True,
                )
                ids, mask = _left_padded(batch, width, pad_id, device)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=model.generation_config,
                    logits_processor=list(processors(start, len(batch))),
                    streamer=streamer,
                    synced_gpus=False,
                )  # (B, T + A)
                answers.extend(_up_to_stop(row, stop_ids) for row in output[:, width:].tolist())
    finally:
        model.generation_config = settings
    return answers


def _left_padded(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """ids (B, T) and mask (B, T), 1 at real tokens: every prompt ends in the last column, where generation begins."""
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _up_to_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    """What was generated before padding set in: the first stop token is the last that counts."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return tuple(ids[:end])


def _rotary_names(module: nn.Module) -> list[str]:
    """Names of a module's rotary state; models with several kinds of attention put the kind before each name."""
    return [name for name in (*vars(module), *module._buffers) if name.endswith(ROTARY_STATE)]


def _on_cpu(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.device.type == "cpu"


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """Python's and torch's generators, this device's included, in a form that compares."""
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), on_device
