"""docs/engines.md lists the families that `fused` supports, from their descriptions."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from glassloop.plan.described import Described, Norms
from glassloop.plan.families import FAMILIES, described
from glassloop.plan.support import fields_of

PAGE = Path(__file__).parents[3] / "docs" / "engines.md"


def differs(of: Described) -> list[str]:
    """What a family's decoder has that Llama's has not, as its config's defaults say."""
    windows = any(kind.window for kind in of.kinds)
    tests = {
        "norms after attention and MLP": of.norms.after_mlp is not None,
        "none before them": of.norms != Norms() and of.norms.before_mlp is None,
        "norms on q and k": bool(of.head_norms),
        "gelu": of.gate != "silu",
        "windows": windows,
        "scores and logits with a cap": of.score_cap is not None,
        "layers without positions": any(kind.rotary is None for kind in of.kinds),
        "frequencies by layer": len({kind.rotary for kind in of.kinds} - {None}) > 1,
        "part of a head turned": of.rotated < of.head_size,
        "neighbours turned together": of.interleaved,
        "scores that grow with the place, beyond the longest row here": of.longest is not None,
        "qkv and gate_up joined": len(of.groups["qkv"]) == 1,
        "gate_up joined": len(of.groups["qkv"]) > 1 and len(of.groups["gate_up"]) == 1,
        "embedding scaled": of.embedding_rounds,
        "factors of embedding, scores, residual, logits": of.score_scale == 1,
    }
    return [name for name, true in tests.items() if true]


def test_the_page_s_table_is_what_the_descriptions_say():
    lines = ["| `model_type` | beside what Llama has |", "| --- | --- |"]
    for kind in FAMILIES:
        of, _ = described(fields_of(AutoConfig.for_model(kind)))
        lines.append(f"| {kind} | {', '.join(differs(of)) or '-'} |")
    table = "\n".join(lines)
    assert table in PAGE.read_text(encoding="utf-8"), f"docs/engines.md should have:\n\n{table}"
