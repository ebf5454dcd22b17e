"""A decoder's shapes, from its config.json or a table of models.

Memory, time and parameter counts are computed from them.

Legend: H hidden size, I intermediate size, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glassloop.predict.experts import experts_in_words
from glassloop.predict.known import Row, sizes_by_name
from glassloop.predict.sizes import odd_size
from glassloop.predict.traits import FAMILIES, JOINED, Traits

ALL_LINEAR = "all-linear"
ATTENTION = "self_attn"  # of a decoder layer's parts; the other is mlp
QKV_BIASED = ("qwen2", "glm", "glm4", "seed_oss")  # by default
IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Llama-like decoder."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied_head: bool = False
    biased: tuple[str, ...] = ()  # names of projections that have a bias
    family: str = "llama"  # config.json's model_type
    positions: int | None = field(default=None, compare=False)  # no size; None: not known

    @property
    def traits(self) -> Traits:
        return FAMILIES[self.family]

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Map each projection of a decoder layer to (in, out).

        Joined ones are apart.
        """
        h, i = self.hidden, self.intermediate
        attention = {
            "q_proj": (h, self.q_width),
            "k_proj": (h, self.kv_width),
            "v_proj": (h, self.kv_width),
        }
        return {
            **attention,
            "o_proj": (self.q_width, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of the layers' linear layers: what NF4 stores in 4 bits."""
        return self.layers * sum(inner * outer for inner, outer in self.projections.values())

    @property
    def embedding_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head_weights(self) -> int:
        """Weights of the head beside the embedding; 0 if they are tied."""
        return 0 if self.tied_head else self.embedding_weights

    @property
    def norm_weights(self) -> int:
        sizes = {"": 0, "head": 2 * self.head_dim, "whole": self.q_width + self.kv_width}
        heads = sizes[self.traits.heads]
        return (self.traits.norms * self.layers + 1) * self.hidden + self.layers * heads

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Map each linear layer of a decoder layer to (in, out).

        Names are the model's.
        """
        apart, found = self.projections, {}
        joined = {part: name for name in self.traits.joined for part in JOINED[name]}
        for name in apart:
            parts = JOINED[joined[name]] if name in joined else (name,)
            outer = sum(apart[part][1] for part in parts)
            found[joined.get(name, name)] = apart[name][0], outer
        return found

    @property
    def weights(self) -> int:
        """All weights (biases of attention, where there are any, not counted)."""
        return self.linear_weights + self.embedding_weights + self.head_weights + self.norm_weights

    def lora_weights(self, r: int, targets: Sequence[str]) -> int:
        """Weights of adapters on these `projections`.

        r x (in + out) each, in all layers.
        """
        return self.layers * sum(r * sum(self.projections[target]) for target in targets)

    def trainable(self, rank_of: Callable[[str], int], targets: Sequence[str]) -> int:
        """Parameters of adapters with these lora.targets, under the model's own names.

        Raises ValueError for a target that the model does not have.

        Args:
            rank_of: rank of a layer, by its whole name.
        """
        paths = self.adapted(targets)
        there = self.linear_layers
        return sum(rank_of(path) * sum(there[path.rpartition(".")[2]]) for path in paths)

    def adapted(self, targets: Sequence[str]) -> list[str]:
        """Whole names of the linear layers that get an adapter.

        Raises ValueError for a target that the model does not have.
        """
        there = self.linear_layers
        names = tuple(there) if ALL_LINEAR in targets else targets
        if unknown := [target for target in names if target not in there]:
            raise ValueError(
                f"lora.targets = {', '.join(unknown)}: {self.name} has {', '.join(there)}. "
                f"Name those, or set lora.targets={ALL_LINEAR}."
            )
        return [
            f"model.layers.{index}.{ATTENTION if name in IN_ATTENTION else 'mlp'}.{name}"
            for index in range(self.layers)
            for name in names
        ]

    def apart(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Names of `projections` that the targets reach, for costs."""
        if ALL_LINEAR in targets:
            return tuple(self.projections)
        return tuple(part for name in targets for part in JOINED.get(name, (name,)))


DEFAULTS: dict[str, dict[str, Any]] = {  # that published config.json files leave to transformers
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
}
KNOWN = {
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shapes(
        "DeepSeek-R1-Distill-Llama-8B", 32, 4096, 14336, 32, 8, 128, 128256, positions=131072
    ),
    "smollm2": Shapes("SmolLM2-135M-Instruct", 30, 576, 1536, 9, 3, 64, 49152, tied_head=True),
    "random:llama-8b": Shapes("random-llama-8b", 32, 4096, 14336, 32, 8, 128, 128256),
    "random:llama-70b": Shapes("random-llama-70b", 80, 8192, 28672, 64, 8, 128, 128256),
    "random:qwen-32b": Shapes("random-qwen-32b", 64, 5120, 27648, 40, 8, 128, 152064),
    "random:tiny": Shapes("random-tiny", 2, 64, 192, 4, 2, 16, 512),
}


def known_shapes(model_id: str) -> Shapes | None:
    """Shapes of a well-known model; `random:NAME:LAYERS` is one cut to some layers."""
    if model_id in KNOWN:
        return KNOWN[model_id]
    name, _, layers = model_id.rpartition(":")
    if name in KNOWN and name.startswith("random:") and layers.isdigit() and int(layers) > 0:
        return replace(KNOWN[name], layers=int(layers), name=f"{KNOWN[name].name}-{layers}")
    return None


def shapes_of(model_id: str) -> tuple[Shapes | None, str]:
    """Shapes of `model_id` and their origin, without the network.

    (None, why and what to do) if they are not known.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _from_file(path / "config.json", model_id)
    if (known := known_shapes(model_id)) is not None:
        return known, "known architecture"
    cached = _downloaded_config(model_id)
    if cached is not None:
        return _from_file(cached, model_id)
    if (row := sizes_by_name(model_id)) is not None:
        return _from_row(row, model_id), "known by its name; a run reads its config.json"
    return (
        None,
        f"model.id = {model_id} is no local folder, is not downloaded, and its sizes are not known "
        "by name. Download it first.",
    )


def config_values(model_id: str) -> dict[str, Any] | None:
    """Contents of config.json of `model_id`; None if it is not here.

    It looks where `shapes_of` does. Known architectures are plain Llamas.
    """
    path = Path(model_id).expanduser()
    known = None if path.is_dir() else known_shapes(model_id)
    if known is not None:
        sizes = {"hidden_size": known.hidden, "intermediate_size": known.intermediate}
        return {
            "model_type": "llama",
            **sizes,
            "num_attention_heads": known.heads,
            "head_dim": known.head_dim,
        }
    file = path / "config.json" if path.is_dir() else _downloaded_config(model_id)
    if file is None and (row := sizes_by_name(model_id)) is not None:
        one = _from_row(row, model_id)
        return {
            "model_type": one.family,
            "hidden_size": one.hidden,
            "intermediate_size": one.intermediate,
            "num_attention_heads": one.heads,
            "head_dim": one.head_dim,
        }
    with contextlib.suppress(OSError, ValueError):
        found = None if file is None else json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def shapes_from_config(values: dict[str, Any], name: str) -> Shapes | None:
    """Shapes from a config.json's content; None for another architecture.

    Raises ValueError if a size is missing.
    """
    values = values.get("text_config") or values
    if values.get("model_type") not in FAMILIES:
        return None
    values = DEFAULTS.get(str(values["model_type"]), {}) | values
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        return Shapes(
            name=name,
            layers=int(values["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(values["intermediate_size"]),
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            vocabulary=int(values["vocab_size"]),
            tied_head=bool(values.get("tie_word_embeddings", False)),
            biased=_biased(values),
            family=str(values["model_type"]),
            positions=values.get("max_position_embeddings"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model.id = {name}: its config.json lacks or garbles a size ({error!r})"
        ) from error


def _biased(values: dict[str, Any]) -> tuple[str, ...]:
    """Projections with a bias.

    A field that config.json lacks has its family's default.
    """
    kind, qkv = values["model_type"], ("q_proj", "k_proj", "v_proj")
    found: tuple[str, ...] = ()
    if values.get("attention_bias", kind in QKV_BIASED):
        found = qkv if kind in QKV_BIASED else (*qkv, "o_proj")
    if kind == "qwen2":  # it has no such field
        found = qkv
    if values.get("attention_out_bias"):
        found = (*found, "o_proj")
    if values.get("use_bias"):  # Ernie 4.5's: of every layer
        return (*qkv, "o_proj", "gate_proj", "up_proj", "down_proj")
    return (*found, "gate_proj", "up_proj", "down_proj") if values.get("mlp_bias") else found


def _from_row(row: Row, model_id: str) -> Shapes:
    """Shapes of a row of known.py."""
    family, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, tied = row
    name = model_id.rstrip("/").rpartition("/")[2]
    sizes = (layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary)
    return Shapes(name, *sizes, tied, _biased({"model_type": family}), family)


def _from_file(file: Path, model_id: str) -> tuple[Shapes | None, str]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return None, f"model.id = {model_id}: {file} cannot be read ({error})"
    if not isinstance(values, dict):
        return None, f"model.id = {model_id}: {file} holds no object"
    if (odd := odd_size(values)) is not None:
        return None, f"model.id = {model_id}: {file} says {odd}"
    shapes = shapes_from_config(values, model_id.rstrip("/").rpartition("/")[2])
    if shapes is None:
        return (
            None,
            f"model.id = {model_id}: model_type {values.get('model_type')} is not one of "
            f"{', '.join(FAMILIES)}{experts_in_words(values)}",
        )
    return shapes, str(file)


def _downloaded_config(model_id: str) -> Path | None:
    """config.json of a hub model that was downloaded, of the newest snapshot."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    found = sorted(
        hub.glob(f"models--{model_id.replace('/', '--')}/snapshots/*/config.json"),
        key=lambda file: file.stat().st_mtime,
    )
    return found[-1] if found else None
