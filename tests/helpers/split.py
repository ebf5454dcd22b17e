"""Two ranks that share passes, against one that computes them whole.

`accelerate launch split.py FOLDER MODEL ROWS` writes FOLDER/split.json: rank 0's distances.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from family_models import adapters_of, fused_of, rows_of, saved_model
from tiny import FOLDER, MODEL, run_of
from transformers import AutoTokenizer

from glassloop.config import LoraConfig, ModelConfig
from glassloop.config.arguments import parse
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.adapters import attach_lora
from glassloop.engines.build import build_engine
from glassloop.formula.dist import gather_objects, leave, reduce_gradients
from glassloop.health.decision import Outcome
from glassloop.loop.build import build_run
from glassloop.loop.run import Run
from glassloop.plan.support import groups_of
from glassloop.predict.tiers import HOSTS, Tiers
from glassloop.record.jsonl import read_jsonl
from train_loop import train, update_once

CPU, RANK = torch.device("cpu"), int(os.environ["RANK"])
RANKS = 2
# name -> model of family_models.py, fields of its config, tokens of a pass's rows
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "plain": ("llama", {}, (13, 4, 21, 1)),
    "one row": ("llama", {}, (31,)),
    "one key head": ("llama", {"num_key_value_heads": 1}, (13, 4, 21, 1)),
    "four key heads": ("llama", {"num_key_value_heads": 4}, (13, 4, 21, 1)),
    "three key heads": (
        "llama",
        {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3},
        (9, 12),
    ),
    "odd groups": (
        "llama",
        {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64},
        (9, 12),
    ),
    "windows": ("ministral", {}, (13, 4, 21, 1)),
    "norms on heads": ("qwen3", {}, (13, 4, 21, 1)),
    "capped, one key head": ("gemma2", {"num_key_value_heads": 1}, (13, 4, 21)),
    "norms on products": ("olmo2", {}, (7, 20)),
}
TIERS = {
    "kept": Tiers(2),
    "recomputed": Tiers(0),
    **{f"{host} away": Tiers(0, host) for host in HOSTS[1:]},
    "chunks": Tiers(0, chunk=5),
    "chunks, all away": Tiers(0, "all", chunk=5),
    "a chunk that is one rank's part": Tiers(0, chunk=19),  # of 39 places: 19 and 20
}


def engine_over(name: str) -> tuple[Any, Any]:
    kind, fields, _ = MODELS[name]
    folder = FOLDER / f"model-{name.replace(' ', '-').replace(',', '')}"
    if RANK == 0:
        saved_model(kind, folder, AutoTokenizer.from_pretrained(MODEL), **fields)
    gather_objects(None)
    names = json.loads((folder / "config.json").read_text())["model_type"]
    targets = ("qkv_proj",) if names == "phi3" else ("q_proj", "v_proj", "o_proj", "up_proj")
    made = build_engine(
        ModelConfig(id=str(folder), quantization="nf4", cache_dir=str(FOLDER / f"cache{RANK}")),
        LoraConfig(r=3, alpha=6, targets=targets),
        precision="fp32",
        checkpointing=False,
        seed=0,
        device=CPU,
        first=contextlib.nullcontext,
    )
    engine = fused_of(made)
    return engine, adapters_of(engine)


def computed(engine: Any, adapters: Any, rows: list[Row], *, shared: bool) -> tuple[Any, ...]:
    """Loss sum, losses of rows and gradient.

    Of both ranks together if they share the pass.
    """
    adapters.zero_grad()
    share = (RANK, RANKS) if shared else None
    p = build_pass(rows, packed=True, pad_id=0, device=CPU, share=share)
    loss_sum, by_row = engine(p)
    (loss_sum / 7).backward()
    grad, loss_sum = adapters.grad.clone(), loss_sum.detach()
    if shared:
        reduce_gradients(grad)
        dist.all_reduce(loss_sum)
        counted = [p.supervised_tokens, p.real_tokens, len(by_row)]
        whole = build_pass(rows, packed=True, pad_id=0, device=CPU)
        told = gather_objects(counted)
        assert sum(one[0] for one in told) == whole.supervised_tokens
        assert sum(one[1] for one in told) == whole.real_tokens
        assert [one[2] for one in told] == [len(rows), 0]
    return loss_sum.item(), by_row, grad


def distance(engine: Any, adapters: Any, rows: list[Row], tiers: Tiers) -> list[float]:
    """Relative distances of loss, rows and gradient from a whole pass's."""
    engine.use_tiers(Tiers(2, streamed=engine.tiers.streamed))
    whole = computed(engine, adapters, rows, shared=False)
    engine.use_tiers(tiers)
    parts, again = (computed(engine, adapters, rows, shared=True) for _ in range(2))
    assert torch.equal(parts[2], again[2]), "a second turn has the same bits"
    assert whole[2].any()
    by_row = 0.0
    if RANK == 0:
        by_row = float((parts[1] - whole[1]).norm() / whole[1].norm())
    return [
        abs(parts[0] / whole[0] - 1),
        by_row,
        float((parts[2] - whole[2]).norm() / whole[2].norm()),
    ]


def labels_at(rows: list[Row], start: float, stop: float) -> list[Row]:
    """The rows with labels in one stretch of all places."""
    total, place, found = sum(map(len, rows)), 0, []
    for row in rows:
        marks = tuple(
            at > 0 and start * total <= place + at < stop * total for at in range(len(row))
        )
        found.append(Row(row.row_id, row.input_ids, marks))
        place += len(row)
    return found


def models() -> dict[str, list[float]]:
    found = {}
    for name, (_, _, lengths) in MODELS.items():
        engine, adapters = engine_over(name)
        rows = rows_of(lengths)
        # Two groups of heads a rank where a pass is cut, one where it is whole.
        more = ("a chunk that is one rank's part",) if name == "four key heads" else ()
        for tiers in ("kept", "chunks", *more):
            found[f"{name}, {tiers}"] = distance(engine, adapters, rows, TIERS[tiers])
    return found


def tiers_and_labels() -> dict[str, list[float]]:
    engine, adapters = engine_over("plain")
    rows, found = rows_of((13, 4, 21, 1)), {}
    for name, tiers in TIERS.items():
        found[name] = distance(engine, adapters, rows, tiers)
    for name, start, stop in (("first", 0.1, 0.4), ("last", 0.7, 1.0), ("border", 0.45, 0.55)):
        for kind in ("kept", "chunks"):
            chosen = labels_at(rows, start, stop)
            found[f"labels {name}, {kind}"] = distance(engine, adapters, chosen, TIERS[kind])
    found["two places"] = distance(engine, adapters, rows_of((2,)), TIERS["kept"])
    return found


def streamed_base() -> list[float]:
    from glassloop.base.streamed import load_streamed
    from glassloop.engines.fused.engine import FusedEngine

    model = ModelConfig(id=MODEL, quantization="nf4")
    hf, report, pages = load_streamed(
        model, groups_of, precision="fp32", device=CPU, first=contextlib.nullcontext
    )
    peft = attach_lora(hf, LoraConfig(r=4, alpha=8), seed=0, base_name="base", commit=None)
    engine = FusedEngine(peft, report, pages=pages)
    adapters = adapters_of(engine)
    return distance(engine, adapters, rows_of((13, 4, 21, 1)), Tiers(0, "inputs", streamed=2))


def runs() -> dict[str, Any]:
    """A run in packed and in split passes, and its records."""
    found: dict[str, Any] = {}
    for layout in ("packed", "split"):
        execution = {"engine": "fused", "layout": layout, "precision": "fp32", "preflight": True}
        record = {"capture_updates": [2], "capsules": 1}
        run = run_of(
            layout, execution=execution, optimizer={"name": "sgd", "lr": 1e-2}, record=record
        )
        code, header, contract = train(run), run.header, run.contract
        assert contract is not None
        run.close_observers()
        found[layout] = {
            "code": code,
            "flat": run.replica.adapters.flat.detach().clone(),
            "header": [line for line in header if line.startswith("executed")],
            "contract": [contract.rows, contract.supervised_tokens],
        }
    one, two = (found[layout].pop("flat") for layout in ("packed", "split"))
    found["apart"] = float((one - two).norm() / one.norm())
    gather_objects(None)
    for layout in ("packed", "split"):
        records = read_jsonl(FOLDER / "runs" / layout / "metrics.jsonl")
        rows = read_jsonl(FOLDER / "runs" / layout / "rows.jsonl")
        found[layout] |= {
            "losses": [one["loss_nats"] for one in records],
            "rows": {
                (one["update"], one["row_id"]).__repr__(): one["loss_sum_nats"] for one in rows
            },
            "record": records[0],
        }
    return found


def refusals() -> dict[str, str]:
    """What each refuses before a weight is read."""
    asked = {
        "peft": {"execution": {"engine": "peft", "layout": "split"}},
        "auto": {"execution": {"engine": "auto", "layout": "split"}},
    }
    found = {}
    for name, sections in asked.items():
        try:
            run_of(f"refused-{name}", **sections)
        except ValueError as error:
            found[name] = str(error)
    return found


def resumed() -> list[float | None]:
    """Losses of a split run's last updates, uninterrupted and resumed."""
    execution = {"engine": "fused", "layout": "split", "precision": "fp32", "deterministic": True}
    run = run_of("whole", execution=execution, checkpoint={"every_updates": 3})
    for u in range(1, 4):
        run.tell(done(run, u))
    run.save(3)
    found = [done(run, u).record.loss_nats for u in range(4, 7)]
    run.close_observers()
    gather_objects(None)
    again = build_run(parse(["--resume", str(FOLDER / "runs" / "whole")]))
    assert again.first_update == 4
    return [*found, *(done(again, u).record.loss_nats for u in range(4, 7))]


def done(run: Run, u: int) -> Outcome:
    outcome = update_once(run, u)
    assert outcome is not None
    return outcome


CHECKS = [runs, resumed, refusals, models, tiers_and_labels, streamed_base]

if __name__ == "__main__":
    results = {check.__name__: check() for check in CHECKS}
    if RANK == 0:
        (FOLDER / "split.json").write_text(json.dumps(results))
    leave()
