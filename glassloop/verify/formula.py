"""A task's result without the loop: the formula in plain transformers.

Rows are computed one by one, with bitsandbytes for NF4 and the 8-bit optimizer.

    N  = supervised tokens of the update's rows
    g  = sum over rows of grad(loss_sum) / N
    c  = min(1, max_norm / |g|)
    theta <- optimizer(theta, c * g, lr(u)),   lr(u) = peak * min(u / W, (U - u + 1) / (U - W + 1))

The label shift and the loss are transformers' own (`labels=`), one row at a time: no padding, no
packing, no ranks. Nothing of glassloop takes part but the rows, which of them make an update, and
where each matrix lies in the flat vector (8-bit states have blocks of it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from glassloop.config import PROJECTIONS
from glassloop.data.batches import Batches
from glassloop.data.rows import IGNORE, Row
from glassloop.formula.optim import Slice
from glassloop.loop.run import Run
from glassloop.verify.members import Place, Trace
from glassloop.verify.problem import (
    LORA_ALPHA,
    LORA_R,
    PEAK_LR,
    TASKS,
    UPDATES,
    WARMUP_UPDATES,
    Task,
)


def train_by_formula(name: str, optimizer: str, place: Place, example: Run) -> Trace:
    """The updates of a task.

    Args:
        example: a hardened run of any member that has made no update yet; its rows, first adapters
            and flat layout are used.
    """
    task, slices = TASKS[name], example.replica.adapters.slices
    flat = torch.nn.Parameter(example.replica.adapters.flat.detach().clone())  # (N,)
    first = flat.detach().clone()
    model = plain_model(task, place, example.replica.device)
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == slices.keys(), "the adapters have other names than the run's"
    step = stepper(optimizer, flat)
    trace = Trace()
    for u in range(1, UPDATES + 1):
        for path, p in parameters.items():
            p.data = slices[path].of(flat.data)
        loss, g = gradient(model, parameters, slices, example.batches, u, len(flat))
        norm = float(torch.linalg.vector_norm(g.double()))
        if task.max_grad_norm is not None:
            g = g * min(1.0, task.max_grad_norm / norm)
        if u == 1:
            trace.grad = g.clone()
        step(
            g,
            PEAK_LR[optimizer]
            * min(u / WARMUP_UPDATES, (UPDATES - u + 1) / (UPDATES - WARMUP_UPDATES + 1)),
        )
        trace.losses.append(loss)
        trace.norms.append(norm)
    trace.change = flat.detach() - first
    return trace


def gradient(
    model: torch.nn.Module,
    parameters: dict[str, torch.nn.Parameter],
    slices: dict[str, Slice],
    batches: Batches,
    u: int,
    size: int,
) -> tuple[float, Tensor]:
    """Token-mean loss in nats and g (N,) of update u's rows."""
    rows = [batches.rows[row] for row in batches.window(u).rows]
    n = sum(sum(row.supervised) for row in rows)
    device = next(iter(parameters.values())).device
    total, g = 0.0, torch.zeros(size, device=device)
    for row in rows:
        if not any(row.supervised):
            continue  # transformers' mean over nothing is NaN
        loss = row_loss_sum(model, row, device)
        grads = torch.autograd.grad(loss / n, list(parameters.values()))
        for path, grad in zip(parameters, grads, strict=True):
            slices[path].of(g).add_(grad)
        total += loss.item()
    return total / n, g


def row_loss_sum(model: torch.nn.Module, row: Row, device: torch.device) -> Tensor:
    """Summed cross-entropy of one row in nats: transformers' mean times the labels."""
    ids = torch.tensor([row.input_ids], device=device)
    labels = torch.tensor(
        [[i if s else IGNORE for i, s in zip(row.input_ids, row.supervised, strict=True)]],
        device=device,
    )
    return model(input_ids=ids, labels=labels, use_cache=False).loss * sum(row.supervised)


def plain_model(task: Task, place: Place, device: torch.device) -> Any:
    """Load the base by transformers and add adapters by PEFT, in fp32."""
    settings: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": device}}
    if task.quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(place.model, **settings)
    lora = LoraConfig(
        r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora).train()


def stepper(name: str, flat: torch.nn.Parameter) -> Callable[[Tensor, float], None]:
    """Build a function (gradient (N,), lr) that moves `flat`.

    It is torch's SGD or bitsandbytes' 8-bit AdamW, with the config's default numbers.
    """
    if name == "sgd":
        optimizer: Any = torch.optim.SGD([flat], weight_decay=0.01)
    else:
        from bitsandbytes.optim.adamw import AdamW8bit

        optimizer = AdamW8bit([flat], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

    def step(g: Tensor, lr: float) -> None:
        flat.grad = g.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return step
