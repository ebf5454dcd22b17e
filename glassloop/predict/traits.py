"""How families of decoders differ from Llama, as far as sizes go."""

from __future__ import annotations

from dataclasses import dataclass

JOINED = {  # names of projections that lie in one matrix
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Traits:
    """Sizes in which a family's decoder layer differs from Llama's.

    Attributes:
        norms: RMS norms of hidden size in a layer.
        heads: norms of q and k: "" none, "head" of head size, "whole" of all heads together.
        after: norms follow the products of o_proj and down_proj.
        joined: names of projections that lie in one matrix.
        capped: scores have a cap, which sdpa lacks: transformers computes them eagerly.
    """

    norms: int = 2
    heads: str = ""
    after: bool = False
    joined: tuple[str, ...] = ()
    capped: bool = False


FAMILIES = {  # by model_type; plan/families.py describes the same ones
    "llama": Traits(),
    "mistral": Traits(),
    "ministral": Traits(),
    "ministral3": Traits(),
    "qwen2": Traits(),
    "qwen3": Traits(heads="head"),
    "phi3": Traits(joined=("qkv_proj", "gate_up_proj")),
    "gemma2": Traits(4, after=True, capped=True),
    "gemma3_text": Traits(4, "head", after=True),
    "granite": Traits(),
    "olmo2": Traits(2, "whole", after=True),
    "olmo3": Traits(2, "whole", after=True),
    "smollm3": Traits(),
    "glm": Traits(joined=("gate_up_proj",)),
    "ernie4_5": Traits(),
    "helium": Traits(),
    "glm4": Traits(4, after=True, joined=("gate_up_proj",)),
    "seed_oss": Traits(),
    "exaone4": Traits(2, "head", after=True),
}
