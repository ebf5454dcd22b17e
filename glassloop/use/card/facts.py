"""Facts for a model card: numbers and public names.

No row, path or secret is among them. Files of the run may be a stranger's: their numbers are
checked here, their strings are escaped where they are written (escape.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from glassloop.disk.opening import read_plain, require_plain_folder
from glassloop.plan.steps import StepPlan
from glassloop.record.reading import RunData, read_run
from glassloop.use.measuring import Report
from glassloop.use.merge.table import Line
from glassloop.use.merge.weights import Weights
from glassloop.use.trained import Trained, adapter_config, adapter_hash

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCES = {  # as their own pages say; a licence id of the hub, and what goes with it
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (
        "mit",
        "MIT; derived from Llama-3.1-8B, whose Llama 3.1 Community Licence applies too",
    ),
    SMOLLM2: ("apache-2.0", "Apache-2.0"),
    "BothBosu/scam-dialogue": ("apache-2.0", "Apache-2.0"),
    "FreedomIntelligence/medical-o1-reasoning-SFT": ("apache-2.0", "Apache-2.0"),
    "sample": ("apache-2.0", "Apache-2.0 (glassloop's own)"),
}
UNKNOWN = "not known to glassloop: look it up, and say it here before you publish"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[A-Za-z0-9][\w./-]{0,99}", re.ASCII)  # a commit, tag or branch
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Report):
    """A file of RUN/evaluated."""

    adapter: str
    max_new_tokens: int
    own_heldout: bool = False


@dataclass(frozen=True)
class Merge:
    """glassloop_merge.json of a merged folder."""

    adapter: str
    merged_into: Literal["original", "dequantised"]
    bits: Literal[4, 16] = 16
    update: int | None = None
    table: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All that the card says.

    `evaluated` is the newest `glassloop evaluate` of these very weights, None if there is none.
    """

    trained: Trained
    run: RunData | None
    plan: StepPlan | None
    base_id: str | None  # hub id; None: a local folder, whose path is private
    base_name: str  # for people
    base_commit: str | None
    base_licence: str | None
    data_id: str | None  # hub id of the data set; None: own rows
    data_name: str
    data_licence: str | None
    evaluated: Evaluation | None
    merge: Merge | None  # None for the adapter


def facts_of(
    trained: Trained,
    *,
    base_id: str | None = None,
    licence: str | None = None,
    data_licence: str | None = None,
    merged: Path | None = None,
) -> Facts:
    """Read them.

    `base_id`, `licence` and `data_licence` are the user's own words on what no file says.

    Raises:
        ValueError: the merged folder is no merge of this adapter, or a file of the run is damaged.
    """
    saved = adapter_config(trained)
    name = str(saved.get("base_model_name_or_path") or trained.config.model.id)
    if base_id is not None and not HUB_ID.fullmatch(base_id):
        raise ValueError(f"--base-id {base_id}: name it owner/name, as the hub does")
    found = base_id or (
        SMOLLM2 if trained.config.model.id == "smollm2" else name if is_hub_id(name) else None
    )
    commit = saved.get("revision") if found == name else None
    if commit is not None and not (isinstance(commit, str) and COMMIT.fullmatch(commit)):
        raise ValueError(
            f"{trained.checkpoint}/adapter_config.json: revision = {commit!r} is no commit, tag or "
            "branch: choose another checkpoint (--at N)"
        )
    source = trained.config.data.source.partition(":")[0]  # owner/name:split
    data_id = source if is_hub_id(source) else None
    data_name = {"sample": "glassloop's own sample of invented phone calls"}.get(
        source, data_id or "rows of the author's own, not published"
    )
    run = read_run(trained.run) if trained.run is not None else None
    return Facts(
        trained=trained,
        run=run,
        plan=None if run is None or run.plan is None else plan_of(run.plan, run.folder),
        base_id=found,
        base_name=found or Path(name).name,
        base_commit=commit,
        base_licence=licence or (LICENCES[found][1] if found in LICENCES else None),
        data_id=data_id,
        data_name=data_name,
        data_licence=data_licence or (LICENCES[source][1] if source in LICENCES else None),
        evaluated=newest_evaluation(trained),
        merge=None if merged is None else merge_of(trained, merged),
    )


def is_hub_id(name: str) -> bool:
    """Tell if a name is owner/name, and no path on this machine."""
    files = (".csv", ".json", ".jsonl", ".parquet")
    return (
        HUB_ID.fullmatch(name) is not None
        and not name.lower().endswith(files)
        and not Path(name).exists()
    )


def plan_of(values: dict[str, Any], folder: Path) -> StepPlan:
    """Read the step plan of a run's plan.json.

    Raises:
        ValueError: it is damaged; names the file and the field.
    """
    path = folder / "plan.json"
    wanted = {field.name: values.get(field.name) for field in fields(StepPlan)}
    plan = checked(StepPlan, wanted, path)
    if plan.tail not in ("keep", "drop") or len(plan.lr) != plan.updates or plan.updates < 1:
        raise ValueError(f"{path} is no plan of glassloop: put back a copy, or remove it")
    return plan


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(kind: type[Read], values: Any, path: Path) -> Read:
    """Build a dataclass from a file's values.

    Raises:
        ValueError: a value does not fit; names file, field and value.
    """
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"{path}: {field} = {str(first['input'])[:80]!r}: {first['msg']}. glassloop wrote no "
            "such file: remove it, or put back a copy"
        ) from error


def newest_evaluation(trained: Trained) -> Evaluation | None:
    """Read the newest evaluation of these very weights.

    Raises:
        ValueError: a file of RUN/evaluated is damaged; names it.
    """
    if trained.run is None:
        return None
    wanted, found = adapter_hash(trained), []
    require_plain_folder(trained.run / "evaluated")
    for path in sorted((trained.run / "evaluated").glob("*.json")):
        try:
            one = json.loads(read_plain(path))
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}): remove it, and run glassloop evaluate again"
            ) from error
        if isinstance(one, dict) and one.get("adapter") == wanted:
            read = checked(Evaluation, one, path)
            found.append((read.own_heldout, read.answered, path.name, read))
    return max(found, key=lambda entry: entry[:3])[3] if found else None


def merge_of(trained: Trained, folder: Path) -> Merge:
    """Facts of a folder that `glassloop merge` wrote from this adapter."""
    path = folder / "glassloop_merge.json"
    try:
        found = checked(Merge, json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--merged {folder} has no readable glassloop_merge.json: name a folder that glassloop "
            "merge wrote"
        ) from error
    if found.adapter != adapter_hash(trained):
        raise ValueError(
            f"--merged {folder} was merged from another adapter (update {found.update}) than "
            f"{trained.checkpoint}: merge again"
        )
    check_weights(folder)
    return found


def check_weights(folder: Path) -> None:
    """Raise ValueError for a merged folder that lacks a file or tensor."""
    files = Weights(folder).files
    for path in sorted(set(files.values())):
        try:
            with safe_open(path, "pt") as file:
                held = set(file.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"--merged {folder}: {path.name} is missing or cut short ({error}): merge again"
            ) from error
        if lost := sorted(
            name for name, place in files.items() if place == path and name not in held
        ):
            raise ValueError(
                f"--merged {folder}: {path.name} lacks {lost[0]} ({len(lost)} such tensors): "
                "merge again"
            )
