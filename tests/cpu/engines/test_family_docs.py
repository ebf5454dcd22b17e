"""docs/engines.md lists the families that `fused` supports, from their descriptions.

Speeds are the last ones that benchmarks/families.py measured on an H200.
"""

from __future__ import annotations

import json
from pathlib import Path

from families_drawn import MODELS
from transformers import AutoConfig

from glassloop.plan.described import Described, Norms
from glassloop.plan.families import FAMILIES, described
from glassloop.plan.support import fields_of

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "engines.md"
MEASURED = ROOT / "benchmarks" / "results" / "families-h200.jsonl"


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


def speeds() -> dict[str, str]:
    """Model type -> tokens/s of each model that was measured, full rows."""
    found: dict[str, dict[str, float]] = {}
    for text in MEASURED.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] == "measured" and line["rows"] == "full" and line["kernel"] == "chosen":
            kind, _ = MODELS[line["model"]]
            found.setdefault(kind, {})[line["model"]] = line["tokens_a_s"]
    return {
        kind: ", ".join(f"{model} {rate:,.0f}" for model, rate in sorted(models.items()))
        for kind, models in found.items()
    }


def test_the_page_s_table_is_what_the_descriptions_and_the_measurements_say():
    lines = [
        "| `model_type` | beside what Llama has | tokens/s on one H200 |",
        "| --- | --- | --- |",
    ]
    rates = speeds()
    for kind in FAMILIES:
        of, _ = described(fields_of(AutoConfig.for_model(kind)))
        lines.append(f"| {kind} | {', '.join(differs(of)) or '-'} | {rates.get(kind, '')} |")
    table = "\n".join(lines)
    assert table in PAGE.read_text(encoding="utf-8"), f"docs/engines.md should have:\n\n{table}"
