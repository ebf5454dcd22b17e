"""Greedy answers during training, and a guard that restores its state.

Legend: B rows, T tokens of the longest prompt, A tokens of an answer.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glassloop.data.templates import Template

# "dynamic" rotary tables grow with the longest row seen
ROTARY_STATE = ("inv_freq", "max_seq_len_cached", "attention_scaling")

Autocast = Callable[[], AbstractContextManager]


class EvaluationStopped(Exception):
    """A stop was asked in mid-evaluation; `evaluate` raises it on every rank."""


class EvaluationLacksMemory(torch.OutOfMemoryError):
    """A card had no room for an evaluation.

    `evaluate` raises it on every rank.
    """


@dataclass(frozen=True)
class EvaluationSetup:
    """Settings by which rows are measured and answered.

    Attributes:
        batch_size: rows of a loss pass on one rank.
        stop_ids: an answer ends at the first of them.
        pad_id: fills shorter rows. It may be one of `stop_ids`.
        max_new_tokens: of an answer, stop token included.
        autocast: gives a new context of the run's compute precision at each call.
        stopped: whether a stop was asked of this rank; looked at before each batch.
        answer_batch: prompts of a generation on one rank; None: batch_size.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    pad_id: int
    batch_size: int
    max_new_tokens: int
    device: torch.device
    autocast: Autocast = nullcontext
    rank: int = 0
    ranks: int = 1
    stopped: Callable[[], bool] = lambda: False
    answer_batch: int | None = None


@contextlib.contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, which restores what an update depends on.

    It restores each module's mode, the rotary tables and each parameter's requires_grad, which
    PEFT's disable_adapter() clears and then sets for all. Drawing a random number is an error.

    no_grad, not inference_mode: a table or quantisation state that a module makes in here and keeps
    would be an inference tensor, which autograd refuses to save in the next update. The difference
    in time is negligible beside the kernels.
    """
    repacking = [
        m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False) and _on_cpu(m)
    ]
    assert not repacking, (
        f"a pass without gradients would repack {len(repacking)} 4-bit layers for inference, and "
        "later updates would lose part of their gradient: set support_avx512bf16_for_cpu = False "
        "on each when the model is loaded"
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
        "evaluation drew random numbers: later dropout masks would differ"
    )


def generate(
    hf: Any,
    prompts: Sequence[Sequence[int]],
    setup: EvaluationSetup,
    *,
    processors: Callable[[int, int], Sequence[Any]] = lambda _first, _count: (),
    streamer: Any = None,
    cut: Callable[[], bool] | None = None,
) -> list[tuple[int, ...]]:
    """Extend each prompt by its most likely tokens, on this rank alone.

    An answer ends with one of `setup.stop_ids`, which is kept, or after `setup.max_new_tokens`.

    The model's own generation settings are not used: a checkpoint may ask for sampling or a
    repetition penalty, and an explicit config inherits what it leaves open. The cache works because
    `unchanged` sets evaluation mode: in training mode transformers drops it under activation
    checkpointing, and each new token sees nothing of the tokens before it.

    Args:
        hf: a PEFT model; its adapters are active unless the caller disabled them.
        processors: (number of a batch's first prompt, its prompts) -> transformers' logits
            processors, which run before the choice; see use/answering.py for one that samples.
        streamer: gets each batch's prompt ids, then each step's new ids (B,), as transformers'
            streamers do.
        cut: looked at after each token; True ends the batch's answers as they are.

    Returns:
        One tuple of new ids a prompt. It is shorter if the model has no more positions.
    """
    from transformers import GenerationConfig

    model = hf.get_base_model()
    settings = model.generation_config
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    answers: list[tuple[int, ...]] = []
    at_once = setup.answer_batch or setup.batch_size
    try:
        with unchanged(hf, setup.device), setup.autocast():
            for start in range(0, len(prompts), at_once):
                if setup.stopped():
                    raise EvaluationStopped
                batch = prompts[start : start + at_once]
                width = max(len(prompt) for prompt in batch)
                room = setup.max_new_tokens
                if positions is not None and width < positions:
                    room = min(room, positions - width)
                model.generation_config = GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=room,
                    eos_token_id=list(setup.stop_ids) or None,
                    pad_token_id=setup.pad_id,
                    use_cache=True,
                    disable_compile=True,
                )
                ids, mask = _left_padded(batch, width, setup)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=model.generation_config,
                    logits_processor=list(processors(start, len(batch))),
                    stopping_criteria=[] if cut is None else [lambda ids, _: _all(ids, cut())],
                    streamer=streamer,
                    synced_gpus=False,
                )  # (B, T + A)
                new = output[:, width:].tolist()
                answers.extend(_up_to_stop(ids, setup.stop_ids) for ids in new)
    finally:
        model.generation_config = settings
    return answers


def _all(ids: Tensor, value: bool) -> Tensor:
    """(B,) bool: the value for each row of ids (B, T)."""
    return torch.full((len(ids),), value, dtype=torch.bool, device=ids.device)


def _left_padded(
    prompts: Sequence[Sequence[int]], width: int, setup: EvaluationSetup
) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: ids and mask, both (B, T).

    Every prompt ends in the last column.
    """
    ids = [[setup.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=setup.device), torch.tensor(mask, device=setup.device)


def _up_to_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    """Cut off the padding: an answer ends with its first stop token."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return tuple(ids[:end])


def _rotary_names(module: nn.Module) -> list[str]:
    """Names of a module's rotary state.

    Models with several kinds of attention put the kind before each name.
    """
    return [name for name in (*vars(module), *module._buffers) if name.endswith(ROTARY_STATE)]


def _on_cpu(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.device.type == "cpu"


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """States of Python's and torch's generators, comparable with ==."""
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), on_device
