"""A stand-in for the package unsloth, with its calls and habits.

For machines without a GPU.

It rests on transformers and PEFT. It prints, seeds every generator, zeroes the embedding's row of
the pad token, chooses a pad token of its own, and leaves generation's marks.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = '''
import random
import types

import numpy, peft, torch, transformers

calls = []


class FastLanguageModel:
    @staticmethod
    def from_pretrained(**asked):
        calls.append(asked)
        print("==((====))==  a banner")
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            asked["model_name"], dtype=asked["dtype"], device_map=asked["device_map"],
            attn_implementation="sdpa",
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model_name"])
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            with torch.no_grad():
                hf.get_input_embeddings().weight[tokenizer.pad_token_id] = 0
        same = tokenizer.pad_token == tokenizer.eos_token
        tokenizer.pad_token = "<|user|>" if same else tokenizer.eos_token
        hf.config.pad_token_id = tokenizer.pad_token_id
        FastLanguageModel.spoil(hf)
        hf.max_seq_length = asked["max_seq_length"]
        return hf, tokenizer

    @staticmethod
    def spoil(hf):
        """Replaced by tests."""

    @staticmethod
    def get_peft_model(model, **asked):
        calls.append(dict(asked))
        transformers.set_seed(asked.pop("random_state"))
        random.random(), numpy.random.rand(), torch.rand(1)
        recompute = asked.pop("use_gradient_checkpointing")
        hf = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **asked))

        def for_training(self):
            calls.append("for_training")
            model.__dict__.pop("_flag_for_generation", None)
            if recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})

        hf.for_training = types.MethodType(for_training, hf)
        return hf
'''
REQUIRES = (
    "torch<2.15.0,>=2.4.0",
    "datasets!=4.0.*,<6.0.0,>=3.4.1",
    "transformers!=5.0.0,<=9.0.0,>=4.52.4",
    "nosuchthing>=1",
)


def write_stand_in(folder: Path, requires: tuple[str, ...] = REQUIRES) -> Path:
    """Write the package and its metadata into `folder`, for sys.path."""
    for name in ("unsloth", "unsloth_zoo"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            PACKAGE if name == "unsloth" else "", encoding="utf-8"
        )
        about = folder / f"{name}-2026.10.9.dist-info"
        about.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 2026.10.9"]
        lines += [f"Requires-Dist: {line}" for line in requires] if name == "unsloth" else []
        (about / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
