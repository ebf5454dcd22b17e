"""Build the data of a run's page.

It is one JSON object of columns, lists and texts.

Rows' text stands in it as data, never as markup.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import glassloop
from glassloop.disk.secrets import without_secrets
from glassloop.record.reading import Record, RunData, flat, number, setting
from glassloop.report.columns import column, heat, whole_numbers
from glassloop.report.machines import machine_columns
from glassloop.report.saying import as_objects
from glassloop.report.sharing import PACKED, without_names, without_text
from glassloop.report.summary import summarise

SCHEMA = 1
SCALARS = {  # column of the page: field of UpdateRecord
    "epoch": "epoch",
    "rows": "rows",
    "lr": "lr",
    "loss": "loss_nats",
    "norm": "grad_norm_pre_clip",
    "clip": "clip_coef",
    "cosine": "rank_cosine",
    "noise": "noise_scale_tokens",
    "supervised": "supervised_tokens",
    "loss_scale": "loss_scale",
    "update_s": "update_s",
    "compute_s": "compute_s",
    "reduce_s": "reduce_s",
    "optimizer_s": "optimizer_s",
}
BY_RANK = {
    "loss": "rank_loss_nats",
    "norm": "rank_grad_norm",
    "supervised": "rank_supervised_tokens",
    "real": "rank_real_tokens",
    "slots": "rank_slot_tokens",
    "passes": "rank_passes",
    "peak_gib": "rank_peak_gib",
    "passes_s": "rank_passes_s",
}
MATRIX_QUANTITIES = ("grad_norm", "update_norm", "update_to_weight", "unmoved_share", "weight_norm")
WORST_ROWS = 12
NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
EVALUATION = (
    "update",
    "loss_nats",
    "rows",
    "supervised_tokens",
    "scores",
    "base",
    "seconds",
    "attempt",
)
TEXT_CHARACTERS = 4000  # of one text at most
ALL_TEXTS_CHARACTERS = 2_500_000


def payload(run: RunData, *, text: bool = True) -> dict[str, Any]:
    """The page's data, without secrets.

    Args:
        text: False leaves out row ids, rows' texts, generated answers, folders and names of people,
            for a page that is shared.
    """
    data = without_secrets(_payload(run if text else without_text(run), text), leave=PACKED)
    return data if text else without_names(data)


def _payload(run: RunData, text: bool) -> dict[str, Any]:
    updates, ranks = run.updates, run.ranks
    return {
        "schema": SCHEMA,
        "kind": "run",
        "title": run.name,
        "folder": str(run.folder),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "glassloop": glassloop.__version__,
        "text": text and run.text != "none",
        "ranks": ranks,
        "planned": run.planned_updates,
        "summary": as_objects(summarise(run)),
        "update": [record["update"] for record in updates],
        "columns": {
            name: column(record.get(field) for record in updates) for name, field in SCALARS.items()
        },
        "by_rank": {
            name: [column(_of_rank(record, field, r) for record in updates) for r in range(ranks)]
            for name, field in BY_RANK.items()
        },
        "machine": machine_columns(run),
        "slow": {record["update"]: record["slow"] for record in run.machine if record["slow"]},
        "skipped": {
            record["update"]: record["reason"]
            for record in updates
            if record["action"] == "skipped"
        },
        "alarms": {
            record["update"]: record["alarms"] for record in updates if record.get("alarms")
        },
        "replaced": [
            {
                name: record[name]
                for name in ("update", "attempt", "action", "loss_nats", "grad_norm_pre_clip")
            }
            for record in run.replaced[:500]
        ],
        "plan": _plan(run),
        "evaluations": [{name: one[name] for name in EVALUATION} for one in run.evaluations],
        "best": None if run.best_evaluation is None else run.best_evaluation["update"],
        "events": [
            {name: event.get(name) for name in ("update", "kind", "message", "command")}
            for event in run.events
        ],
        "probes": _probes(run.probes),
        "rows": _rows(run.rows),
        "texts": _texts(run.rows),
        "samples": _samples(run.samples),
        "memory": memory(run.events),
        "max_grad_norm": setting(run.config, "optimizer.max_grad_norm"),
        "layout": setting(run.config, "execution.layout"),
        "config": _finite(flat(run.config)),
        "env": _finite(flat(run.env)),
    }


def memory(events: list[Record]) -> dict[str, Any] | None:
    """Return predicted and measured memory by phase, in GiB.

    {"phases": {phase: [predicted, measured]}, "card": GiB}, from what the preflight said; None
    without a GPU.
    """
    phases: dict[str, list[float | None]] = {}
    card = None
    for event in events:
        if event["kind"] == "memory":
            for phase, predicted, measured in re.findall(
                rf"([a-z]+) ({NUMBER}|unknown) / ({NUMBER})", event["message"]
            ):
                phases[phase] = [
                    None if predicted == "unknown" else float(predicted),
                    float(measured),
                ]
        if event["kind"] == "preflight" and (
            total := re.search(rf"peak {NUMBER} GiB of ({NUMBER})", event["message"])
        ):
            card = float(total[1])
    return {"phases": phases, "card": card} if phases or card else None


def _finite(value: Any) -> Any:
    """Turn numbers that are not finite into text, for JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _of_rank(record: Record, field: str, rank: int) -> Any:
    values = record.get(field)
    return values[rank] if values is not None and rank < len(values) else None


def _plan(run: RunData) -> dict[str, Any] | None:
    plan = run.plan
    if plan is None:
        return None
    by_update = plan.get("by_update") or {}
    scalars = {
        name: value
        for name, value in plan.items()
        if isinstance(value, int | float | str) and name != "schema"
    }
    return {
        "lr": column(plan.get("lr") or []),
        "rows": column(by_update.get("rows") or []),
        "supervised": column(by_update.get("supervised_tokens") or []),
        "real": column(by_update.get("real_tokens") or []),
        "numbers": _finite(scalars | (plan.get("contract") or {})),
    }


def _probes(probes: list[Record]) -> dict[str, Any] | None:
    """Return heat maps, and the numbers of all matrices together.

    Probes of another set of matrices than the last one's are left out.
    """
    if not probes:
        return None
    names, modules = probes[-1]["matrices"], probes[-1]["modules"]
    probes = [probe for probe in probes if probe["matrices"] == names]
    maps = {
        name: heat([probe.get(name) for probe in probes], len(names)) for name in MATRIX_QUANTITIES
    }
    return {
        "update": [probe["update"] for probe in probes],
        "matrices": names,
        "modules": modules,
        "maps": {name: value for name, value in maps.items() if value is not None},
        "delta": heat([probe.get("delta_norm") for probe in probes], len(modules)),
        "ratio": column(probe.get("all_update_to_weight") for probe in probes),
        "unmoved": column(probe.get("all_unmoved_share") for probe in probes),
    }


def _rows(rows: list[Record]) -> dict[str, Any] | None:
    if not rows:
        return None
    ids = list(dict.fromkeys(row["row_id"] for row in rows))
    place = {row_id: i for i, row_id in enumerate(ids)}
    return {
        "ids": ids,
        "id": whole_numbers([place[row["row_id"]] for row in rows]),
        "update": whole_numbers([row["update"] for row in rows]),
        "rank": whole_numbers([row["rank"] for row in rows]),
        "micro_batch": whole_numbers([row["micro_batch"] for row in rows]),
        "loss_sum": column(row["loss_sum_nats"] for row in rows),
        "supervised": whole_numbers([row["supervised_tokens"] for row in rows]),
        "real": whole_numbers([row["real_tokens"] for row in rows]),
        "worst": worst_rows(rows),
    }


def worst_rows(rows: list[Record]) -> list[dict[str, Any]]:
    """List the rows with the highest loss a token.

    Each stands once, the worst first; those that were not finite come before all.
    """
    worst: dict[str, dict[str, Any]] = {}
    for row in rows:
        loss = number(row["loss_sum_nats"])
        if not row["supervised_tokens"] or loss is None:
            continue
        nats = loss / row["supervised_tokens"]
        rank = nats if math.isfinite(nats) else math.inf
        seen = worst.setdefault(row["row_id"], {"id": row["row_id"], "times": 0, "key": -math.inf})
        seen["times"] += 1
        seen["last_nats"] = nats if math.isfinite(nats) else None
        if rank > seen["key"]:
            seen |= {
                "key": rank,
                "update": row["update"],
                "rank": row["rank"],
                "micro_batch": row["micro_batch"],
            }
            seen |= {
                "worst_nats": nats if math.isfinite(nats) else None,
                "supervised": row["supervised_tokens"],
            }
    first = sorted(worst.values(), key=lambda one: one["key"], reverse=True)[:WORST_ROWS]
    return [{name: value for name, value in one.items() if name != "key"} for one in first]


def _texts(rows: list[Record]) -> dict[str, Any]:
    """Return each row's text once: {"by_id", "cut", "left_out"}.

    Texts of the worst rows come first, as far as there is room.
    """
    known = {row["row_id"]: row["text"] for row in rows if "text" in row}
    first = [one["id"] for one in worst_rows(rows)] if known else []
    kept: dict[str, str] = {}
    cut = room = 0
    for row_id in dict.fromkeys([*(i for i in first if i in known), *known]):
        piece = known[row_id][:TEXT_CHARACTERS]
        if room + len(piece) > ALL_TEXTS_CHARACTERS:
            break
        kept[row_id], room, cut = piece, room + len(piece), cut + (len(piece) < len(known[row_id]))
    return {"by_id": kept, "cut": cut, "left_out": len(known) - len(kept)}


def _samples(samples: list[Record]) -> list[dict[str, Any]]:
    """By row: the first answer that is on record and the last."""
    by_row: dict[str, list[Record]] = {}
    for sample in samples:
        by_row.setdefault(sample["row_id"], []).append(sample)
    names = ("update", "base", "answer", "answer_tokens")
    return [
        {
            "id": row_id,
            "prompt": found[-1]["prompt"],
            "expected": found[-1]["expected"],
            "answers": [
                {name: one[name] for name in names}
                for one in (found[0], *found[-1:][: len(found) - 1])
            ],
        }
        for row_id, found in by_row.items()
    ]
