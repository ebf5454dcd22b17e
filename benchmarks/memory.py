"""GPU memory by phase, predicted beside measured.

One process, the base loaded once, adapters rebuilt for every rank.

    python benchmarks/memory.py model.id=/path/to/model
    python benchmarks/memory.py --calibrate model.id=/path/to/model

There are 24 cells: 512 and 2048 tokens, 1 and 2 rows, recomputed and stored, r 8, 16 and 32.
Writes JSON lines to $OUT or benchmarks/results/memory-<card>.jsonl: one for the machine, one for
each cell, one summary. The prediction was fitted to the cells of CALIBRATION. They are marked and
left out of the summary. Without a GPU the same code runs and measures nothing (null).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glassloop.base.checks import check_plain_head
from glassloop.base.quantised import load_base
from glassloop.base.reading import DTYPES
from glassloop.config import Config
from glassloop.config.arguments import parse
from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.disk.environment import environment
from glassloop.engines.adapters import attach_lora
from glassloop.engines.norms import fuse_norms
from glassloop.engines.peft import PeftEngine, recompute_layers
from glassloop.formula.optim import FlatAdapters, l2_norm, make_optimizer
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import Shapes, shapes_of
from glassloop.predict.terms import GIB, Work

RESULTS = Path(__file__).resolve().parent / "results"
MARK = 0.10  # most that the predicted peak of the engine peft may be off


@dataclass(frozen=True)
class Cell:
    tokens: int
    rows: int
    checkpointing: bool
    r: int


# 2 x 2048 tokens, recomputed, r = 16 was known when the terms were written down (7.63 GiB on an
# H100).
CALIBRATION = (Cell(2048, 2, True, 16), Cell(1024, 2, True, 16), Cell(1024, 2, False, 16))
MATRIX = tuple(
    Cell(*sizes) for sizes in itertools.product((512, 2048), (1, 2), (True, False), (8, 16, 32))
)


class Meter:
    """Peak of the allocator's memory since the last reading; None without a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Bytes at the highest point since the last reading; starts anew."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        found = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return found

    def now(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def reserved(self) -> int | None:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else None


def measure(
    cell: Cell, base: Any, report: Any, config: Config, loaded: int | None, device: torch.device
) -> dict[str, int | None]:
    """Bytes by phase of the second update of a cell. The base is left as it came."""
    meter = Meter(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = meter.now()
    recompute(base, False)  # while PEFT looks: it would make the embeddings require grad
    lora = config.lora.model_copy(update={"r": cell.r})
    hf = attach_lora(base, lora, seed=config.seed, base_name=report.name, commit=report.commit)
    try:
        recompute(hf, cell.checkpointing)
        engine = PeftEngine(hf, report).train()
        adapters = FlatAdapters(hf.named_parameters())
        gc.collect()
        now = meter.now()
        phases: dict[str, int | None] = {"load": loaded}
        phases["adapters"] = (
            None if now is None or before is None or loaded is None else loaded + now - before
        )
        o = config.optimizer
        optimizer = make_optimizer(
            o.name,
            adapters.flat,
            lr=o.lr,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
        )
        p = full_pass(cell, hf.config.get_text_config().vocab_size, device)  # type: ignore[union-attr, operator]
        for _ in range(2):  # the first update still lacks optimizer state and some workspaces
            phases |= one_update(engine, adapters, optimizer, p, config, meter)
        phases["reserved"] = meter.reserved()
        return phases
    finally:
        hf.unload()
        for p_base in base.parameters():
            p_base.grad = None


def recompute(model: Any, on: bool) -> None:
    """Switch recomputation as transformers does; how it is done, `recompute_layers` chose once."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


def one_update(
    engine: PeftEngine,
    adapters: FlatAdapters,
    optimizer: torch.optim.Optimizer,
    p: Pass,
    config: Config,
    meter: Meter,
) -> dict[str, int | None]:
    """A pass and a step as the loop does them, with the peak of each phase."""
    phases: dict[str, int | None] = {}
    adapters.zero_grad()
    meter.reset()
    decoder = engine.hf.get_base_model().get_decoder()  # type: ignore[operator]
    hook = decoder.register_forward_hook(lambda *_: phases.__setitem__("forward", meter.peak()))
    precision = config.execution.precision
    # As Accelerate prepares a model.
    autocast = (
        torch.autocast(meter.device.type, dtype=DTYPES[precision])
        if precision != "fp32"
        else contextlib.nullcontext()
    )
    try:
        with autocast:
            loss_sum, _ = engine(p)
    finally:
        hook.remove()
    phases["logits"] = meter.peak()
    (loss_sum / p.supervised_tokens).backward()
    del loss_sum
    phases["backward"] = meter.peak()
    norm = l2_norm(adapters.grad)
    adapters.checksum(optimizer)
    adapters.grad.mul_(float(1 / max(1.0, norm.item())))
    optimizer.step()
    phases["optimizer"] = meter.peak()
    phases["peak"] = max((v for v in phases.values() if v is not None), default=None)
    return phases


def full_pass(cell: Cell, vocabulary: int, device: torch.device) -> Pass:
    """Rows of the full length, everything after the first token supervised.

    The heaviest pass of its size.
    """
    rows = []
    for row in range(cell.rows):
        ids = tuple(
            3 + (7919 * place + 31 * row) % (vocabulary - 3) for place in range(cell.tokens)
        )
        rows.append(Row(f"row:{row}", ids, (False, *[True] * (cell.tokens - 1))))
    return build_pass(rows, packed=False, pad_id=0, device=device)


def predicted(
    cell: Cell, shapes: Shapes, config: Config, capability: tuple[int, int]
) -> dict[str, int]:
    work = Work(
        rows=cell.rows,
        tokens=cell.tokens,
        supervised_tokens=cell.rows * (cell.tokens - 1),
        r=cell.r,
        targets=config.lora.targets,
        quantization=config.model.quantization,
        double_quantization=config.model.double_quantization,
        precision=config.execution.precision,
        checkpointing=cell.checkpointing,
        optimizer=config.optimizer.name,
        attention=config.model.attention,
        capability=capability,
    )
    return ledger_of(shapes, work).phases


def compared(cell: Cell, expected: dict[str, int], found: dict[str, int | None]) -> dict[str, Any]:
    """A cell's line.

    GiB predicted and measured by phase, and by how much the prediction is off (0.01: 1 % too high).
    """
    gib = lambda size: None if size is None else round(size / GIB, 4)  # noqa: E731
    off = {
        phase: round(expected[phase] / size - 1, 4)
        for phase, size in found.items()
        if size and phase in expected
    }
    return {
        "kind": "cell",
        **vars(cell),
        "calibrates": cell in CALIBRATION,
        "predicted_gib": {phase: gib(size) for phase, size in expected.items()},
        "measured_gib": {phase: gib(size) for phase, size in found.items()},
        "off": off,
    }


def summed_up(lines: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Over the cells that count.

    How many, the worst error of the peak, and whether all are inside the mark (None: nothing was
    measured).
    """
    off = {
        json.dumps({k: line[k] for k in vars(MATRIX[0])}): line["off"]["peak"]
        for line in lines
        if "peak" in line.get("off", {}) and not line["calibrates"]
    }
    worst = max(off, key=lambda cell: abs(off[cell]), default=None)
    return {
        "kind": "summary",
        "cells_that_count": len(off),
        "mark": MARK,
        "worst_cell": None if worst is None else json.loads(worst),
        "worst_off": None if worst is None else off[worst],
        "within_mark": None if worst is None else abs(off[worst]) <= MARK,
        "seconds": round(seconds, 1),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="memory.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="only the cells that the prediction may be fitted to",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write (default: $OUT or benchmarks/results, memory-<card>.jsonl)",
    )
    parser.add_argument(
        "--commit", help="commit that is measured, where the machine holds no checkout"
    )
    parser.add_argument("--cells", type=int, help="only the first so many cells")
    given, rest = parser.parse_known_args(argv)
    words = ["r1_8b_scam", *rest] if not rest or "=" in rest[0] or rest[0].startswith("-") else rest
    config = parse([words[0], "execution.engine=peft", *words[1:]], prog="memory.py")
    started = time.monotonic()
    shapes, where = shapes_of(config.model.id)
    if shapes is None:
        raise ValueError(where)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    out = given.out or folder / f"memory-{plain}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)

    base, report = load_base(
        config.model,
        precision=config.execution.precision,
        device=device,
        first=contextlib.nullcontext,
    )
    gc.collect()
    loaded = Meter(device).now()
    check_plain_head(base, device, report.name)
    fuse_norms(base)
    recompute_layers(base, config.model.id)
    lines: list[dict[str, Any]] = []
    with open(out, "w", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        about = {
            "engine": "peft",
            "shapes": vars(shapes),
            "quantization": config.model.quantization,
            "precision": config.execution.precision,
        }
        write(
            {
                "kind": "machine",
                "commit": given.commit,
                "card": name,
                **about,
                "environment": environment(["memory.py", *argv]),
            }
        )
        for cell in (CALIBRATION if given.calibrate else MATRIX)[: given.cells]:
            expected = predicted(cell, shapes, config, capability)
            try:
                line: dict[str, Any] = compared(
                    cell, expected, measure(cell, base, report, config, loaded, device)
                )
            except torch.OutOfMemoryError as error:
                line = compared(cell, expected, {}) | {
                    "out_of_memory": str(error).splitlines()[0][:200]
                }
            gc.collect()
            lines.append(line)
            write(line)
            shown = {k: line[k].get("peak") for k in ("predicted_gib", "measured_gib", "off")}
            print(f"{cell}: peak {shown}", flush=True)
        summary = summed_up(lines, time.monotonic() - started)
        write(summary)
    print(json.dumps(summary))
    print(f"written: {out}")
    return 0 if summary["within_mark"] is not False else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
