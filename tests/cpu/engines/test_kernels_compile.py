"""Kernels compile for Hopper without a GPU: the interpreter does not see what the compiler refuses.

Options that families other than Llama need; Llama's own run on every GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton's compiler",
)

BF16, FP32 = "*bf16", "*fp32"
ATTENTION = {"GROUP": 2, "D": 64, "OWN": 64, "STEP": 32, "SPLIT": True}
BENT = ATTENTION | {"CAPPED": True, "WINDOWED": True, "WIDE": True}
# kernel -> constants. Other arguments are by name: see TYPES; else a whole number.
KERNELS: dict[str, dict[str, Any]] = {
    "attention_kernels.forward_kernel": BENT,
    "attention_kernels.queries_kernel": BENT,
    "attention_kernels.keys_kernel": BENT,
    "norm._norm_heads": {"HEADS": 8, "SIZE": 128},
    "norm._norm_heads_backward": {"HEADS": 8, "SIZE": 256},
    "norm._norm_backward": {"ADD": False, "BLOCK": 4096},
    "rotary._rotate": {"HEADS": 64, "PAIRS": 32, "BACK": True, "INTERLEAVED": True},
    "swiglu._swiglu": {"GELU": True, "BLOCK": 1024},
    "swiglu._swiglu_backward": {"GELU": True, "BLOCK": 1024},
    "loss._cross_entropy": {"PLAIN": False, "CAPPED": True, "BLOCK": 8192},
}
TYPES = (
    dict.fromkeys(("x", "q", "k", "v", "out", "grad", "into", "gate_up", "logits"), BF16)
    | dict.fromkeys(("lse", "sums", "cos", "sin", "q_weight", "k_weight", "weight", "losses"), FP32)
    | dict.fromkeys(("scale", "scale_2", "bend", "cap", "eps", "a", "b"), "fp32")
    | {"table": "*i32", "labels": "*i64"}
)


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles(name, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"glassloop.engines.fused.{module}"), function)
    constants = KERNELS[name]
    said = {one for one in kernel.arg_names if one.isupper()}
    assert said == set(constants), "a constant of the kernel is not given here"
    signature = {
        argument: "constexpr" if argument in constants else TYPES.get(argument, "i32")
        for argument in kernel.arg_names
    }
    given = {(kernel.arg_names.index(one),): value for one, value in constants.items()}
    made = compile(
        ASTSource(kernel, signature, given),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "num_stages": 3},
    )
    assert made.metadata.shared < 227 * 1024  # bytes of shared memory that a block may have
    assert "ptx" in made.asm
