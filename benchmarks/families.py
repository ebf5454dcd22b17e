"""`fused` on one card over drawn weights of several families' real shapes: tokens/s, GiB.

    python benchmarks/families.py --out FILE [--only qwen3-8b,gemma-3-12b] [--layers 2]

Each line is a measurement, written as it comes. The model is that of transformers' config; its
linear layers are drawn and quantised one at a time, so that no base is ever whole in 16 bits. Full
rows have 2,048 tokens; short rows have the lengths of scam dialogues, packed. Every model is
compared with `peft` on some 64 tokens before it is timed (engines/fused/proof.py). A model whose
head size two attention kernels can serve is timed with each.

Unsloth gets the same weights, adapters and rows in a process of its own (families_unsloth.py) once
the model has left the card: padded micro-batches of `--unsloth-batch` rows, its own recomputation.
`--unsloth-python` names its interpreter. Where it is not installed, or refuses a model, a line says
why. A line of kind `ratio` sets real tokens/s beside Unsloth's.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from families_drawn import MODELS, drawn_model, save_base
from lines import line_writer

from glassloop.base.quantised import LoadReport
from glassloop.bench.workloads import workload
from glassloop.config import LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.disk.environment import environment
from glassloop.engines.adapters import attach_lora, linear_names
from glassloop.engines.fused import attention
from glassloop.engines.fused.attention_work import TILES, Tile, Tiles
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.fused.proof import disagreement
from glassloop.engines.norms import fuse_norms
from glassloop.formula.optim import FlatAdapters, l2_norm
from glassloop.predict.choice import Asked
from glassloop.predict.tiers import Tiers as Memory

GIB = 2**30
# Block sizes for heads of 256, tried here alone: within a block's shared memory on Hopper.
WIDE = Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2))


def rows_within(tokens: int, vocabulary: int, *, short: bool) -> list[Row]:
    """Rows of about `tokens` tokens together."""
    longest = min(2048, tokens)
    kind = "scam-v1" if short else "full-v1"
    rows: list[Row] = []
    for row in workload(kind, max(1, tokens // 128), vocabulary=vocabulary):
        cut = Row(row.row_id, row.input_ids[:longest], row.supervised[:longest])
        if sum(map(len, rows)) + len(cut) > tokens:
            break
        rows.append(cut)
    return rows


def passes_of(tokens: int, vocabulary: int, device: torch.device, *, short: bool) -> Pass:
    """A packed pass of about `tokens` tokens."""
    rows = rows_within(tokens, vocabulary, short=short)
    return build_pass(rows, packed=True, pad_id=0, device=device)


def beside_unsloth(
    name: str, folder: Path, facts: dict[str, Any], asked: argparse.Namespace, say: Any
) -> list[dict[str, Any]]:
    """Unsloth's lines of a model whose base lies in `folder`."""
    size = asked.unsloth_batch
    batches = {}
    for kind, short in (("full", False), ("scam", True)):
        rows = rows_within(asked.tokens, facts["vocabulary"], short=short)
        ids = [list(row.input_ids) for row in rows]
        batches[kind] = [ids[start : start + size] for start in range(0, len(ids), size)]
    given = folder.parent / "asked.json"
    plain = dict(folder=str(folder), longest=2048, r=16, targets=facts["targets"])
    plain |= dict(passes=asked.passes, checkpointing=True, device=facts["device"])
    given.write_text(json.dumps(plain | {"batches": batches}), encoding="utf-8")
    script = Path(__file__).with_name("families_unsloth.py")
    done = subprocess.run(
        [asked.unsloth_python, str(script), str(given)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=asked.unsloth_timeout,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if not lines:
        lines = [{"absent": f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"}]
    for line in lines:
        say(kind="unsloth", model=name, **line)
    return lines


def ratios(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], say: Any) -> None:
    """A line for each kind of rows that both have: tokens/s over Unsloth's, GiB of both."""
    for line in theirs:
        for own in ours:
            if own["rows"] == line.get("rows") and own["kernel"] == "chosen":
                times = own["tokens_a_s"] / line["tokens_a_s"]
                gib = {"gib": own["gib"], "unsloth_gib": line["gib"]}
                say(kind="ratio", model=name, rows=own["rows"], times=times, **gib)


def seconds(engine: FusedEngine, p: Pass, adapters: FlatAdapters, repeats: int) -> list[float]:
    """Seconds of each of some passes, forward and backward."""
    found = []
    for _ in range(repeats):
        adapters.zero_grad()
        wait()
        started = time.perf_counter()
        loss_sum, _ = engine(p)
        (loss_sum / p.supervised_tokens).backward()
        wait()
        found.append(time.perf_counter() - started)
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels_of(engine: FusedEngine) -> list[tuple[str, Tiles | None]]:
    """Attention kernels to time, as (name, block sizes to put in TILES)."""
    size = engine.of.head_size
    own: list[tuple[str, Tiles | None]] = [("chosen", TILES.get(size))]
    return [*own, ("triton", WIDE)] if size == 256 else own


def measure(
    name: str,
    asked: argparse.Namespace,
    device: torch.device,
    say: Any,
    folder: Path | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time one model; a line for each kind of rows and kernel.

    Returns these lines, and what Unsloth has to know of the model.

    Args:
        folder: to save the base in; None: it is not saved.
    """
    started = time.perf_counter()
    hf = drawn_model(name, device, asked.layers, asked.small)
    if folder is not None:
        save_base(hf, folder)
    fuse_norms(hf)
    lora = LoraConfig(r=16, alpha=16, targets=linear_names(hf))
    peft = attach_lora(hf, lora, seed=0, base_name=name, commit=None)
    report = LoadReport(name, None, "", 0, None, False, 0.0, ())
    engine = FusedEngine(peft, report)
    adapters = FlatAdapters(peft.named_parameters())
    drawn = torch.Generator(device).manual_seed(1)
    adapters.flat.data.normal_(0, 0.01, generator=drawn)
    vocabulary = engine.head.shape[0]
    wait()
    say(kind="built", model=name, seconds=time.perf_counter() - started, gib=allocated())
    rows = [
        replace(row, input_ids=row.input_ids[:64], supervised=row.supervised[:64])
        for row in workload("scam-v1", 8, vocabulary=vocabulary)
    ]
    rows = [replace(row, supervised=(False,) * 20 + (True,) * 44) for row in rows]
    measured: list[dict[str, Any]] = []
    for kernel, tiles in kernels_of(engine):
        if tiles is not None:
            TILES[engine.of.head_size] = tiles
        try:
            said = disagreement(engine, adapters, rows, packed=True, pad_id=0)
            say(kind="proof", model=name, kernel=kernel, differs=said)
            for short in (False, True):
                p = passes_of(asked.tokens, vocabulary, device, short=short)
                line = {"kernel": kernel, **timed(engine, adapters, p, asked, short=short)}
                say(model=name, **line)
                measured.append(line)
        except (RuntimeError, ValueError) as error:
            say(kind="failed", model=name, kernel=kernel, error=f"{error}"[:600])
        finally:
            TILES.pop(256, None)
    facts = dict(targets=list(lora.targets), vocabulary=vocabulary, device=device.type)
    return measured, facts


def timed(
    engine: FusedEngine, adapters: FlatAdapters, p: Pass, asked: argparse.Namespace, *, short: bool
) -> dict[str, Any]:
    """A line of one workload, with memory spent as memory.profile asks."""
    engine.use_tiers(Memory(1))
    tiers = engine.choose_tiers(
        Asked(asked.profile, p.input_ids.numel(), p.supervised_tokens, host_bytes=0)
    )
    engine.use_tiers(tiers)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    first = seconds(engine, p, adapters, 1)[0]
    times = seconds(engine, p, adapters, asked.passes)
    tokens = p.input_ids.numel()
    size = engine.of.head_size
    return {
        "kind": "measured",
        "rows": "scam" if short else "full",
        "tokens": tokens,
        "tiers": asdict(tiers),
        "first_s": first,
        "pass_s": times,
        "tokens_a_s": tokens / statistics.median(times),
        "gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
        "attention": attention.choose_kernel(
            p.lengths, engine.embedding.device, engine.embedding.dtype, size
        ),
        "norm": l2_norm(adapters.grad).item(),
    }


def allocated() -> float | None:
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None


def installed(python: str) -> bool:
    """Whether an interpreter has Unsloth: a base is not written for nothing."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('unsloth') is None)"
    return subprocess.run([python, "-c", look], check=False).returncode == 0


def one_model(
    name: str, asked: argparse.Namespace, device: torch.device, say: Any, folder: Path
) -> None:
    """Measure a model, give its memory back, and let Unsloth have the card."""
    ours, facts = [], {}
    has = not asked.no_unsloth and installed(asked.unsloth_python)
    if not has:
        why = "--no-unsloth" if asked.no_unsloth else "the package unsloth is not installed"
        say(kind="unsloth", model=name, absent=why)
    try:
        ours, facts = measure(name, asked, device, say, folder if has else None)
    except (RuntimeError, ValueError) as error:
        say(kind="failed", model=name, error=f"{error}"[:600])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if has and facts:
        try:
            ratios(name, ours, beside_unsloth(name, folder, facts, asked, say), say)
        except subprocess.TimeoutExpired as error:
            say(kind="unsloth", model=name, absent=f"it took more than {error.timeout:g} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(MODELS), help="names, by comma")
    parser.add_argument("--tokens", type=int, default=16384, help="of a pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of the model, in place of its own")
    parser.add_argument("--profile", default="fill", help="memory.profile: fill, min or GiB")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--unsloth-python", default=sys.executable, help="interpreter of Unsloth")
    parser.add_argument("--unsloth-batch", type=int, default=2, help="rows of its micro-batch")
    parser.add_argument("--unsloth-timeout", type=float, default=900.0, help="seconds a model")
    parser.add_argument("--no-unsloth", action="store_true", help="leave Unsloth out")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--only {unknown[0]}: choose of {', '.join(MODELS)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    asked.out.unlink(missing_ok=True)

    say = line_writer(asked.out, fresh=False)
    say(kind="environment", **environment(sys.argv))
    for name in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="families-") as temporary:
            one_model(name, asked, device, say, Path(temporary) / "base")
        say(kind="done", model=name, seconds=time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
