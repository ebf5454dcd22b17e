"""The peers, their models and their adapters.

Of glassloop only parts without dependencies are imported: a peer's interpreter has none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.bench.spec import Spec

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED = 3407


@dataclass(frozen=True)
class Peer:
    """How a peer is asked to work.

    Attributes:
        library: trl | unsloth | axolotl, which is also the key of --python. batch: rows of a
            micro-batch.
        checkpointing: activations recomputed; for Unsloth its own way, with inputs kept on the
            host.
        kbit: after PEFT's prepare_model_for_kbit_training, as many tutorials have it.
    """

    library: str
    batch: int = 2
    checkpointing: bool = True
    kbit: bool = False
    liger: bool = False
    padding_free: bool = False


PEERS = {
    "trl": Peer("trl"),
    "trl-kbit": Peer("trl", kbit=True),
    "trl-liger": Peer("trl", liger=True),
    "trl-padfree": Peer("trl", padding_free=True),
    "unsloth-trainer": Peer("unsloth"),  # its own loop; `unsloth` alone is glassloop's engine
    "unsloth-kept": Peer("unsloth", checkpointing=False),
    "unsloth-b8": Peer("unsloth", batch=8),
    "unsloth-b8k": Peer("unsloth", batch=8, checkpointing=False),
    "axolotl-offload": Peer("axolotl"),  # TRL's trainer with axolotl's layer_offloading
}


def trainer_class(peer: Peer) -> Any:
    """The trainer of a peer: TRL's, for axolotl with its mixin in front."""
    from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    if peer.library != "axolotl":
        return SFTTrainer
    from axolotl.core.trainers.mixins import (  # pyright: ignore[reportMissingImports]
        LayerOffloadingMixin,
    )

    return type("OffloadingTrainer", (LayerOffloadingMixin, SFTTrainer), {})


def check_offloads(trainer: Any) -> None:
    """Raise RuntimeError if axolotl's trainer keeps the layers on the card.

    It only logs that it found no layers or no card.
    """
    manager = getattr(trainer, "_layer_offload_manager", None)
    if manager is None or not manager.enabled:
        raise RuntimeError("axolotl's layer_offloading did not start: this would be TRL's trainer")


def trl_model(peer: Peer, spec: Spec, base: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    """transformers + PEFT, as TRL's own documentation combines them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    attention = "flash_attention_2" if peer.padding_free else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map={"": device}, attn_implementation=attention
    )
    if peer.kbit:
        how: dict[str, Any] = dict(
            use_gradient_checkpointing=peer.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        model = prepare_model_for_kbit_training(model, **how)
    lora = LoraConfig(
        r=spec.r,
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(base)


def unsloth_model(
    peer: Peer, r: int, base: Path, dtype: Any, device: Any, most_tokens: int = 2048
) -> tuple[Any, Any]:
    """Unsloth's own loader, on the same files."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=most_tokens,
        dtype=dtype,
        load_in_4bit=True,
        device_map={"": device.index or 0},
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=r,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth" if peer.checkpointing else False,
        random_state=SEED,
    )
    return model, tokenizer


def draw_adapters(model: Any) -> None:
    """The A matrices that glassloop draws for the same seed, in the same order
    (adapters.attach_lora), so that norms can be compared.
    """
    import math

    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                drawn = torch.empty(parameter.shape)
                torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)
