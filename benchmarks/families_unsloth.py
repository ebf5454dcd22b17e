"""Models of families.py through Unsloth: `python benchmarks/families_unsloth.py ASKED.json`.

Its loader and its patches over the same drawn NF4 weights, with adapters on the same layers and the
same rows, a micro-batch of padded rows a pass. One line of JSON for each kind of rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def main() -> int:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if why := absent(asked["device"]):
        print(json.dumps({"absent": why}))
        return 0
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(Path(sys.argv[1]).parent / "unsloth_compiled"),
    }
    for line in measured(asked):
        print(json.dumps(line), flush=True)
    sys.stdout.flush()
    os._exit(0)  # Unsloth can hang in its own shutdown


def absent(device: str) -> str:
    """Why Unsloth is not measured here; empty if it is."""
    if importlib.util.find_spec("unsloth") is None:
        return "the package unsloth is not installed"
    return "" if device == "cuda" else "unsloth needs CUDA"


def measured(asked: dict[str, Any]) -> Any:
    """Yield a line for each kind of rows; one that says why if the model cannot be loaded."""
    import unsloth  # pyright: ignore[reportMissingImports]  # noqa: F401, I001
    import torch
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    device = torch.device("cuda", 0)
    try:
        model, _ = FastLanguageModel.from_pretrained(
            asked["folder"],
            max_seq_length=asked["longest"],
            dtype=torch.bfloat16,
            load_in_4bit=True,
            device_map={"": 0},
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=asked["r"],
            lora_alpha=asked["r"],
            lora_dropout=0,
            bias="none",
            target_modules=asked["targets"],
            use_gradient_checkpointing="unsloth" if asked["checkpointing"] else False,
        ).train()
        for kind, batches in asked["batches"].items():
            yield {"rows": kind} | timed(model, batches, asked["passes"], device)
    except (RuntimeError, ValueError, TypeError, AttributeError, OSError, ImportError) as error:
        yield {"absent": f"{type(error).__name__}: {error}"[:600]}  # a peer's refusal is a result


def timed(model: Any, batches: list[list[list[int]]], passes: int, device: Any) -> dict[str, Any]:
    """Seconds of forward and backward over all micro-batches, repeated; the first is apart."""
    import torch

    ready = [padded(batch, device) for batch in batches]
    real = sum(len(row) for batch in batches for row in batch)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(passes + 1):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for ids, mask, labels in ready:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB
    rate = real / statistics.median(times[1:])
    return {
        "tokens": real,
        "first_s": times[0],
        "pass_s": times[1:],
        "tokens_a_s": rate,
        "gib": peak,
    }


def padded(rows: list[list[int]], device: Any) -> tuple[Any, Any, Any]:
    """ids, mask and labels (B, T) of rows, padded to the right; every token is a label."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask, ids.masked_fill(mask == 0, -100)


if __name__ == "__main__":
    sys.exit(main())
