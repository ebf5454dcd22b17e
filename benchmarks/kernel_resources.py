"""Registers, spills and shared memory of the fused engine's kernels, by card.

    python benchmarks/kernel_resources.py --out benchmarks/results/kernel-resources.jsonl

No card is needed: a rehearsal (glassloop/engines/fused/rehearsal.py) compiles the kernels of a
model's passes for cards that are not there, and CUDA's cuobjdump, which Triton brings, reads the
binaries. It shows that a kernel fits a card, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KIB = 1024
# Compute capability times 10 -> bytes of shared memory that a block may have (CUDA C++ Programming
# Guide, technical specifications by compute capability).
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}
REGISTERS = 255  # of a thread, on every card
SPILLED = 64  # bytes of a thread, at most: two or three values of a loop, held by the L1 cache
MODELS = (  # one of each kind of head, norm and gate
    "llama-3.1-8b",
    "smollm2-1.7b",
    "qwen2.5-7b",
    "qwen3-8b",
    "gemma-2-9b",
    "gemma-3-12b",
)


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        spilled: bytes of a thread's stack and local memory.
        shared: bytes of a block.
    """

    card: int
    model: str
    kernel: str
    triton: str
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def excess(self) -> str:
        """Name what is beyond the card's limits; else empty."""
        allowed = SHARED[self.card]
        if self.shared > allowed:
            return f"{self.shared} bytes of shared memory, sm{self.card} has {allowed}"
        if self.registers > REGISTERS:
            return f"{self.registers} registers, a thread has {REGISTERS}"
        return f"{self.spilled} bytes spilled" if self.spilled > SPILLED else ""


def resources_of(card: int, model: str) -> list[Resources]:
    """Compile the kernels of a model's passes for a card; one entry a variant."""
    import torch
    import triton
    from absent_card import card as absent_card
    from absent_card import compiled

    from glassloop.config import LoraConfig
    from glassloop.engines.fused.rehearsal import Quantised, rehearse, shapes

    with absent_card(card):
        rehearse(shapes(config_of(model), LoraConfig(), torch.bfloat16, Quantised()))
        found = [(name, made.asm["cubin"], made.metadata) for (name, _), made in compiled().items()]
    version = triton.__version__
    made = [
        Resources(
            card,
            model,
            name.lstrip("_"),
            version,
            meta.num_warps,
            *usage(cubin),
            meta.shared,
        )
        for name, cubin, meta in found
    ]
    return sorted(set(made), key=lambda one: (one.kernel, one.warps, one.shared, one.registers))


def config_of(model: str) -> Any:
    """Config of a well-known model's sizes. Raises ValueError for an unknown name."""
    from transformers import AutoConfig

    from glassloop.predict.known import sizes_by_name

    sizes = sizes_by_name(model)
    if sizes is None:
        raise ValueError(f"--models {model}: unknown; glassloop/predict/known.py has the names")
    kind, layers, hidden, intermediate, heads, key_heads, head_size, vocabulary, tied = sizes
    return AutoConfig.for_model(
        kind,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_size,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
    return parsed(said)


def parsed(said: str) -> tuple[int, int]:
    """Read cuobjdump's line of the one function.

    Raises ValueError if it has another form.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if len(found) != 1:
        raise ValueError(f"cuobjdump says nothing that is known: {said[:300]!r}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def main(argv: list[str] | None = None) -> int:
    """Write one line a kernel. Returns 1 if one is beyond a card's limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    lines, beyond = [], 0
    for card in given.cards:
        for model in given.models:
            for one in resources_of(card, model):
                beyond += bool(one.excess)
                print(
                    f"sm{one.card} {one.model:9} {one.kernel:20} {one.warps:2} warps "
                    f"{one.registers:4} registers {one.spilled:4} B spilled "
                    f"{one.shared / KIB:6.1f} KiB  {one.excess}"
                )
                lines.append(json.dumps(asdict(one)))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
