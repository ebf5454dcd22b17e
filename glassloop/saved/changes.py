"""The fields that may differ when a run resumes, and their effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from glassloop.config import Config, ScheduleConfig, as_dict
from glassloop.plan.contract import has_rows_digest
from glassloop.plan.steps import StepPlan, lr_at, warmup_of
from glassloop.saved.run_state import RunState

# Sections and fields of a config that say what an update computes.
MATH = ("seed", "model", "lora", "data", "batch", "schedule", "optimizer")
# Fields in them that do not.
FREE = ("model.cache_dir", "model.init_adapter", "model.trust_remote_code", "batch.ranks")
# Fields that say where base and rows lie: the base's hash and the rows' digest say what they are.
WHERE_BASE = ("model.id", "model.revision")
WHERE_ROWS = (
    "data.source",
    "data.config",
    "data.split",
    "data.revision",
    "data.format",
    "data.columns",
    "data.heldout",
)


@dataclass(frozen=True)
class Notice:
    """The text of an event at the start of a run."""

    kind: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


def config_changes(
    saved: Mapping[str, Any], present: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Fields ("lora.r") whose values differ, with both values.

    A field that one side lacks is None there.
    """

    def leaves(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: list(tree) if isinstance(tree, tuple) else tree}
        return {
            k: leaf
            for key, branch in tree.items()
            for k, leaf in leaves(branch, f"{name}.{key}".lstrip(".")).items()
        }

    old, new = leaves(saved), leaves(present)
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }


def computes(name: str) -> bool:
    """True for a field that says what an update computes."""
    return name.partition(".")[0] in MATH and name not in FREE


def check_same_math(
    saved: Mapping[str, Any], present: Mapping[str, Any], allowed: Collection[str], cure: str
) -> None:
    """Raise ValueError for fields that differ and say what an update computes.

    Args:
        allowed: such fields, or sections, that may differ all the same.
    """
    wrong = [
        f"{name} was {old!r} and now is {new!r}"
        for name, (old, new) in config_changes(saved, present).items()
        if computes(name)
        and not any(f"{name}.".startswith(f"{one}.") for one in allowed)
        and not _is_newer(name, new, saved)
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: {cure}")


def _is_newer(name: str, value: Any, saved: Mapping[str, Any]) -> bool:
    """True for a field with its default that an older version lacks."""
    known: Any = saved
    default: Any = as_dict(Config())
    lacking = False
    for part in name.split("."):
        if not isinstance(default, dict) or part not in default:
            return False
        default = default[part]
        lacking = lacking or not isinstance(known, dict) or part not in known
        known = None if lacking else known[part]
    return lacking and value == default


def changes(
    config: Config, saved: RunState, plan: StepPlan, old: dict[str, Any]
) -> tuple[tuple[str, ...], tuple[Notice, ...]]:
    """Fields of MATH that may differ; notices for reshaped or longer runs.

    Call it once the rows are known to be those of `old`, if that has their digest.

    Args:
        saved: what the run resumes from. old: plan.json of the run.
    """
    allowed = [*WHERE_BASE, *(WHERE_ROWS if has_rows_digest(old) else ())]
    notices: list[Notice] = []
    if config.resume.reshape:
        allowed += ["batch.size", "batch.accumulation", "batch.rows_per_update"]
    if plan.ranks != saved.world_size:
        notices.append(Notice("reshaped", _reshaping(saved.world_size, plan)))
    schedule = ScheduleConfig.model_validate(saved.config["schedule"])
    updates = schedule.updates or old.get("updates", plan.updates)
    if plan.updates > updates:
        allowed += ["schedule.updates", "schedule.epochs"]
        notices.append(Notice("longer", _lengthening(schedule, saved, updates, plan)))
    return tuple(allowed), tuple(notices)


def settings_changed(recorded: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """A resumed run's fields that differ from its config.yaml, with both values."""
    found = config_changes(as_dict(recorded), as_dict(config))
    return {name: values for name, values in found.items() if not name.startswith("resume.")}


def _reshaping(ranks: int, plan: StepPlan) -> str:
    own = ""
    if plan.ranks > ranks:
        own = f"; ranks {ranks} to {plan.ranks - 1} begin with random numbers of their own"
    return (
        f"resumed with {plan.ranks} rank{'s' if plan.ranks > 1 else ''} instead of {ranks}: "
        f"the same {plan.rows_per_update} rows an update in the same order, as {plan.size} rows "
        f"x {plan.ranks} ranks x {plan.accumulation} micro-batches. No longer bit for bit what "
        f"{ranks} would do: losses and gradients are summed in another order (last bits), and "
        f"dropout draws other numbers, since rows move between ranks{own}"
    )


def _lengthening(schedule: ScheduleConfig, saved: RunState, updates: int, plan: StepPlan) -> str:
    """Say how a longer schedule changes the coming learning rates."""
    done, peak = saved.update, float(saved.config["optimizer"]["lr"])
    points = {done + 1, (done + updates + 1) // 2, updates, updates + 1, plan.updates}
    coming = sorted(points & set(range(done + 1, plan.updates + 1)))

    def before(u: int) -> str:
        if u > updates:
            return "none"
        lr = lr_at(
            u,
            updates=updates,
            warmup=warmup_of(updates, schedule.warmup_updates, schedule.warmup_share),
            peak=peak,
            kind=schedule.kind,
            first=schedule.first,
        )
        return f"{lr:.3g}"

    table = ", ".join(f"lr({u}) was {before(u)}, is {plan.lr[u - 1]:.3g}" for u in coming)
    last = f"; update {done} had {plan.lr[done - 1]:.3g}" if done else ""
    effect = "" if schedule.kind == "constant" else ", so the learning rate falls later"
    return f"trains {plan.updates} updates instead of {updates}{effect}: {table}{last}"
