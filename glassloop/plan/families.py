"""Families of models that `fused` supports: from a config to a description.

A function a family. It reads a config's fields through `Fields`, which notes their names: a field
of transformers' config that is neither read nor in FREE, and is set, refuses the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from glassloop.plan.described import Described, Kind, Norms, groups

# Kinds whose frequencies do not depend on a row's length; longrope's do not up to a length.
ROTARY = ("default", "linear", "llama3", "yarn", "longrope")
# Fields that change no number of a training pass, or whose part in it is read off the modules.
FREE = frozenset(
    """
    architectures attention_bias attention_dropout attention_out_bias auto_map bos_token_id
    chunk_size_feed_forward dtype embd_pdrop eos_token_id head_dim hidden_size id2label
    initializer_range intermediate_size is_encoder_decoder label2id max_position_embeddings
    mlp_bias model_type name_or_path num_attention_heads num_hidden_layers num_key_value_heads
    original_max_position_embeddings output_attentions output_hidden_states pad_token_id
    problem_type quantization_config resid_pdrop residual_dropout return_dict
    tie_word_embeddings torch_dtype transformers_version use_cache vocab_size
    """.split()  # noqa: SIM905  (a list of them would take 40 lines)
)
SANDWICH = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
JOINED_GATE_UP = ("mlp.gate_up_proj",)


class Unsupported(ValueError):
    """A model's setting that `fused` does not support, as a sentence."""


class Fields:
    """A model's config; notes which fields are read."""

    def __init__(self, values: Mapping[str, Any]):
        self.values, self.read = values, {"rope_theta", "rope_local_base_freq"}

    def get(self, name: str, absent: Any = None) -> Any:
        """A field's value; `absent` only if the config lacks the field."""
        self.read.add(name)
        return self.values.get(name, absent)

    def one_of(self, name: str, *known: Any) -> Any:
        """A field's value, by default the first known one.

        Raises Unsupported for another.
        """
        value = self.get(name, known[0])
        if value not in known:
            names = ", ".join(map(repr, known))
            raise Unsupported(f"the model's config has {name} = {value!r}, fused knows {names}")
        return value

    def number(self, name: str, absent: float) -> float:
        return float(self.get(name) or absent)


def rope_sets(f: Fields) -> dict[str, Mapping[str, Any]]:
    """Rotary parameters by name; one set has the name "".

    Raises Unsupported for another kind.
    """
    found = f.get("rope_parameters") or f.get("rope_scaling") or {}
    f.get("rope_scaling")
    nested = {name: one for name, one in found.items() if isinstance(one, Mapping)}
    for one in (nested or {"": found}).values():
        kind = one.get("rope_type", one.get("type", "default"))
        if kind not in ROTARY:
            names = ", ".join(map(repr, ROTARY))
            raise Unsupported(f"the model's config has rope_type = {kind!r}, fused knows {names}")
        if one.get("llama_4_scaling_beta") and f.get("model_type") != "ministral3":
            raise Unsupported(
                "the model's config has llama_4_scaling_beta: scores depend on places"
            )
    return nested or {"": found}


def longest_of(f: Fields) -> int | None:
    """Tokens of a row up to which the frequencies stay.

    None: of any row.
    """
    found = []
    for one in rope_sets(f).values():
        if one.get("rope_type", one.get("type")) == "longrope":
            own = f.get("original_max_position_embeddings")
            if not (length := one.get("original_max_position_embeddings", own)):
                raise Unsupported("the model's config has longrope without its original length")
            found.append(int(length))
    return min(found, default=None)


def rotary_share(f: Fields, *, free: bool) -> float:
    """Part of a head that carries positions.

    Other than 1 only for families with such code.
    """
    share = f.get("partial_rotary_factor")
    share = next(iter(rope_sets(f).values())).get("partial_rotary_factor", share)
    if share not in (None, 1) and not free:
        raise Unsupported(
            f"the model's config has partial_rotary_factor = {share!r}, fused knows 1 for this "
            "family"
        )
    return 1.0 if share is None else float(share)


def kinds_of(f: Fields, window: int | None) -> tuple[Kind, ...]:
    """Kinds of the layers by `layer_types`.

    Each has the frequencies of its own type.
    """
    types = f.get("layer_types") or ["full_attention"] * int(f.get("num_hidden_layers") or 1)
    known = ("full_attention", "sliding_attention")
    if unknown := set(types) - set(known):
        raise Unsupported(
            f"the model's config has layer_types = {sorted(unknown)[0]!r}, fused knows "
            + ", ".join(map(repr, known))
        )
    sets = rope_sets(f)
    return tuple(
        Kind(window if one == "sliding_attention" else None, one if one in sets else "")
        for one in types
    )


def plain(f: Fields, *, partial: bool = False, activation: str = "hidden_act") -> Described:
    """Describe what families have in common: Llama's decoder."""
    f.one_of("pretraining_tp", 1, None)
    gelu = activation != "hidden_act"
    f.one_of(activation, *(("gelu_pytorch_tanh",) if gelu else ("silu",)))
    heads = int(f.get("num_attention_heads") or 1)
    size = int(f.get("head_dim") or int(f.get("hidden_size") or heads) // heads)
    layers = int(f.get("num_hidden_layers") or 1)
    return Described(
        heads=heads,
        key_heads=int(f.get("num_key_value_heads") or heads),
        head_size=size,
        eps=f.number("rms_norm_eps", 1e-6),
        kinds=(Kind(),) * layers,
        rotated=int(size * rotary_share(f, free=partial)),
        score_scale=size**-0.5,
        longest=longest_of(f),
        gate="gelu_tanh" if gelu else "silu",
    )


def llama(f: Fields) -> Described:
    f.one_of("sliding_window", None)
    return plain(f)


def qwen2(f: Fields) -> Described:
    f.get("max_window_layers")  # layer_types has it
    used, window = f.get("use_sliding_window", False), f.get("sliding_window")
    return replace(plain(f), kinds=kinds_of(f, window if used else None))


def qwen3(f: Fields) -> Described:
    return replace(qwen2(f), head_norms="head")


def mistral(f: Fields) -> Described:
    one, window = plain(f), f.get("sliding_window")
    return replace(one, kinds=tuple(replace(kind, window=window) for kind in one.kinds))


def ministral(f: Fields) -> Described:
    return replace(plain(f), kinds=kinds_of(f, f.get("sliding_window")))


def ministral3(f: Fields) -> Described:
    one = mistral(f)
    (found,) = rope_sets(f).values()
    if not found.get("llama_4_scaling_beta"):
        return one
    # scores grow with log(1 + place // length), which is 0 below that length
    length = found.get("original_max_position_embeddings")
    if not length:
        raise Unsupported("the model's config has llama_4_scaling_beta without its length")
    return replace(one, longest=int(length))


def phi3(f: Fields) -> Described:
    f.one_of("lm_head_bias", False, None)
    f.get("interpolation_factor")  # of Phi-4-mini's file; transformers has no such field
    one, window = plain(f, partial=True), f.get("sliding_window")
    return replace(
        one,
        kinds=tuple(replace(kind, window=window) for kind in one.kinds),
        groups=groups(("self_attn.qkv_proj",), JOINED_GATE_UP),
    )


def gemma2(f: Fields) -> Described:
    f.one_of("use_bidirectional_attention", None, False)
    return replace(
        plain(f, activation="hidden_activation"),
        kinds=kinds_of(f, f.get("sliding_window", 4096)),
        norms=SANDWICH,
        added_one=True,
        score_scale=f.number("query_pre_attn_scalar", 256) ** -0.5,
        score_cap=f.get("attn_logit_softcapping"),
        embedding_scale=f.number("hidden_size", 1) ** 0.5,
        embedding_rounds=True,
        logit_cap=f.get("final_logit_softcapping"),
    )


def gemma3(f: Fields) -> Described:
    # transformers hands the cap of scores to no attention of Gemma 3
    f.one_of("attn_logit_softcapping", None)
    for name in ("_sliding_window_pattern", "sliding_window_pattern"):
        f.get(name)  # layer_types has it
    return replace(gemma2(f), head_norms="head")


def granite(f: Fields) -> Described:
    return replace(
        plain(f),
        score_scale=f.number("attention_multiplier", 1),
        embedding_scale=f.number("embedding_multiplier", 1),
        residual_scale=f.number("residual_multiplier", 1),
        logit_scale=1 / f.number("logits_scaling", 1),
    )


def olmo2(f: Fields) -> Described:
    f.one_of("clip_qkv", None)
    return replace(plain(f), norms=AFTER, head_norms="whole")


def olmo3(f: Fields) -> Described:
    return replace(olmo2(f), kinds=kinds_of(f, f.get("sliding_window", 4096)))


def smollm3(f: Fields) -> Described:
    one = qwen2(f)
    f.get("no_rope_layer_interval")  # no_rope_layers has it
    turned = f.get("no_rope_layers") or [1] * len(one.kinds)
    kinds = zip(one.kinds, turned, strict=True)
    return replace(one, kinds=tuple(kind if t else replace(kind, rotary=None) for kind, t in kinds))


def glm4(f: Fields) -> Described:
    norms = Norms(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    )
    one = plain(f, partial=True)
    return replace(one, norms=norms, interleaved=True, groups=groups(gate_up=JOINED_GATE_UP))


def glm(f: Fields) -> Described:
    one = plain(f, partial=True)
    return replace(one, interleaved=True, groups=groups(gate_up=JOINED_GATE_UP))


def ernie4_5(f: Fields) -> Described:
    f.get("use_bias")  # read off the modules
    return replace(plain(f), interleaved=True)


def helium(f: Fields) -> Described:
    return replace(plain(f), interleaved=True)


def seed_oss(f: Fields) -> Described:
    return plain(f)


def exaone4(f: Fields) -> Described:
    f.get("sliding_window_pattern")  # layer_types has it
    window = f.get("sliding_window")
    kinds = kinds_of(f, window)
    if window is not None:  # hybrid: layers that see everything have no positions
        kinds = tuple(replace(k, rotary=None) if k.window is None else k for k in kinds)
    return replace(plain(f), norms=AFTER, head_norms="head", kinds=kinds)


FAMILIES: dict[str, Callable[[Fields], Described]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "ministral": ministral,
    "ministral3": ministral3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "granite": granite,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "glm": glm,
    "glm4": glm4,
    "ernie4_5": ernie4_5,
    "helium": helium,
    "seed_oss": seed_oss,
    "exaone4": exaone4,
}


# Models for more than text -> the family of their decoder, whose config is text_config.
MULTIMODAL = {"gemma3": "gemma3_text"}


def text_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a config.

    `values` themselves for a model of text alone.
    """
    kind = MULTIMODAL.get(str(values.get("model_type")))
    if kind is None:
        return values
    return {**(values.get("text_config") or {}), "model_type": kind}


def described(values: Mapping[str, Any]) -> tuple[Described, frozenset[str]]:
    """Describe a model, and name the fields that were read.

    Args:
        values: of the loaded config. A config.json may lack fields whose default transformers
            fills in: its description then only tells whether the model is supported.

    Raises:
        Unsupported: naming the first field that is not, its value and the supported ones.
    """
    f = Fields(text_of(values))
    return FAMILIES[f.one_of("model_type", *FAMILIES)](f), frozenset(f.read)
