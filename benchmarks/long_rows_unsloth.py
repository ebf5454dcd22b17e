"""Rows of long_rows.py through Unsloth: `python benchmarks/long_rows_unsloth.py ASKED.json`.

Its loader, its patches and its default checkpointing, one row an update, every token a label.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 2**30
CONTEXT_GIB = 0.5  # as predict/cards.py


def main() -> int:
    asked = json.loads(Path(sys.argv[1]).read_text())
    out = Path(asked["out"])
    if importlib.util.find_spec("unsloth") is None or asked["device"] != "cuda":
        why = "the package unsloth is not installed" if asked["device"] == "cuda" else "needs CUDA"
        for one in asked["cases"]:
            say(out, one | {"trained": False, "absent": why})
            say(out, {"kind": "done", "case": one})
        return 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    with tempfile.TemporaryDirectory(prefix="long-rows-base-") as folder:
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(folder) / "unsloth_compiled")
        train(asked, out, Path(folder) / "base")
    return 0


def train(asked: dict[str, Any], out: Path, folder: Path) -> None:
    """Load the base once, and do each case."""
    from peers import base_folder  # before Unsloth, which patches what is imported after it

    base = base_folder(asked["model"], "bf16", "cuda", folder)
    import unsloth  # pyright: ignore[reportMissingImports]  # noqa: F401, I001
    import torch
    from bitsandbytes.optim.adamw import AdamW8bit
    from card_limit import limit_card
    from peer_models import PEERS, unsloth_model

    started, device = time.perf_counter(), torch.device("cuda", 0)
    most = max(int(one["asked"]) for one in asked["cases"])
    peer = PEERS["unsloth-trainer"]
    model, _ = unsloth_model(peer, asked["r"], base, torch.bfloat16, device, most)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained, lr=1e-5)
    say(out, {"kind": "load", "seconds": time.perf_counter() - started})
    for one in asked["cases"]:
        limit_card(one["card_gb"] * 23.5 / 24 - CONTEXT_GIB, device)
        say(out, one | row_of(model, optimizer, int(one["asked"]), asked["seconds"]))
        say(out, {"kind": "done", "case": one})


def row_of(model: Any, optimizer: Any, tokens: int, seconds: float) -> dict[str, Any]:
    """Updates of one row; `error` if it did not train."""
    import torch

    drawn = torch.Generator().manual_seed(tokens)
    ids = torch.randint(10, model.config.vocab_size, (1, tokens), generator=drawn).cuda()
    line: dict[str, Any] = {"tokens": tokens, "trained": False}
    times: list[float] = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        while more_updates(times, seconds):
            started = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            line["loss_nats"] = float(loss)
        line |= {"trained": True, "updates_s": times, "tokens_per_s": tokens / min(times)}
        line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    except torch.OutOfMemoryError as error:
        line["error"] = str(error).partition("\n")[0][:300]
        optimizer.zero_grad(set_to_none=True)
    return line


def more_updates(times: list[float], seconds: float) -> bool:
    """Two at least: the first of a length compiles."""
    return len(times) < 2 or (len(times) < 4 and sum(times) + times[-1] < seconds)


def say(out: Path, line: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
