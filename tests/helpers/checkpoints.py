"""Small trained adapters whose checkpoints are saved, damaged and loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from glassloop.config import Config, as_dict
from glassloop.disk import publish as folders
from glassloop.formula.optim import FlatAdapters, make_optimizer
from glassloop.saved import state as snapshots
from glassloop.saved.checkpoint import (
    Saved,
    load_checkpoint,
    save_checkpoint,
)
from glassloop.saved.run_state import RunState

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
BASE = "sha256:base"
RANKS = 2
CONFIG = as_dict(Config.model_validate({}))


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=32,
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    return LlamaForCausalLM(config).eval()


@dataclass
class Bench:
    """A tiny run: 7,168 flat elements, enough for 8-bit states.

    Dropout makes each update depend on torch's random numbers.
    """

    model: Any
    adapters: FlatAdapters
    optimizer: torch.optim.Optimizer

    def update(self, count: int) -> None:
        self.model.train()
        for _ in range(count):
            self.adapters.zero_grad()
            ids = torch.tensor(
                [
                    [random.randrange(64) for _ in range(12)],
                    numpy.random.randint(0, 64, 12).tolist(),
                ]
            )  # (2, 12)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()

    def bits(self) -> dict[str, Any]:
        """Everything that a restore changes, as bytes.

        Padding between matrices is left out: no model reads it.
        """
        tensors, plain = snapshots.optimizer_state(self.optimizer, self.adapters.flat)
        tensors |= {
            name: place.of(self.adapters.flat.detach())
            for name, place in self.adapters.slices.items()
        }
        bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return {**bits, "plain": plain, "rng": snapshots.rng_state(CPU)}


def bench(name: str = "adamw_8bit", seed: int = 0, r: int = 2) -> Bench:
    base = base_model()
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=r, lora_alpha=16, lora_dropout=0.2, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    adapters = FlatAdapters(model.named_parameters())
    return Bench(
        model,
        adapters,
        make_optimizer(
            name, adapters.flat, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01
        ),
    )


def state_at(update: int, **changed: Any) -> RunState:
    state = RunState(update=update, epoch=0, world_size=RANKS, base_hash=BASE, config=CONFIG)
    return replace(
        state,
        **{"versions": {"torch": torch.__version__}, "tracker_ids": {"wandb": "abc"}, **changed},
    )


def save(run: Path, one: Bench, tokenizer: Any, state: RunState, keep: int = 9) -> Saved:
    return save_checkpoint(
        run / "checkpoints",
        state,
        adapters=one.adapters,
        peft_model=one.model,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        base_id="org/base",
        base_revision="0123abc",
        optimizer=one.optimizer,
        rng_states=[snapshots.rng_state(CPU)] * state.world_size,
        keep=keep,
    )


def load(path: Path, one: Bench, rank: int = 1, **changed: Any) -> RunState:
    given = {"world_size": RANKS, "base_hash": BASE, "config": CONFIG, **changed}
    return load_checkpoint(path, adapters=one.adapters, optimizer=one.optimizer, rank=rank, **given)


def refused(path: Path, one: Bench, **changed: Any) -> str:
    """The message of a refusal that changed nothing."""
    before = one.bits()
    with pytest.raises(ValueError) as error:  # noqa: PT011 (each test looks at the message)
        load(path, one, **changed)
    assert one.bits() == before, "a refused checkpoint changed something"
    assert str(path) in str(error.value)
    assert "rank 1" in str(error.value)
    return str(error.value)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def resum(folder: Path, changed: str) -> None:
    """Make the sum of a file right again, as a forger would."""
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = [
        (folders._digest((folder / name).read_bytes()) if name == changed else digest, name)
        for digest, name in lines
    ]
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


def forge(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a JSON or safetensors file holds, sums included."""
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)
    resum(folder, name)


def without(plain: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key != name}
