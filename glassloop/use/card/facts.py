"""What a run's folder says that a model card may repeat: numbers, names of public things, no row, no path, no secret."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from glassloop.record.reading import RunData, read_run
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


@dataclass(frozen=True)
class Facts:
    """All that the card says. `evaluated` is the newest `glassloop evaluate` of these very weights, None where there is none."""

    trained: Trained
    run: RunData | None
    base_id: str | None  # hub id; None: a local folder, whose path is nobody's business
    base_name: str  # for people
    base_commit: str | None
    base_licence: str | None
    data_id: str | None  # hub id of the data set; None: own rows
    data_name: str
    data_licence: str | None
    evaluated: dict[str, Any] | None
    merge: dict[str, Any] | None  # facts of a merged folder, None for the adapter


def facts_of(
    trained: Trained,
    *,
    base_id: str | None = None,
    licence: str | None = None,
    data_licence: str | None = None,
    merged: Path | None = None,
) -> Facts:
    """Read them. `base_id`, `licence` and `data_licence` are the user's own word on what cannot be known.

    Raises:
        ValueError: the merged folder is no merge of this adapter, or a file of the run is damaged.
    """
    saved = adapter_config(trained)
    name = str(saved.get("base_model_name_or_path") or trained.config.model.id)
    found = base_id or (
        SMOLLM2 if trained.config.model.id == "smollm2" else name if is_hub_id(name) else None
    )
    source = trained.config.data.source
    data_id = source if is_hub_id(source) else None
    data_name = {"sample": "glassloop's own sample of invented phone calls"}.get(
        source, data_id or "rows of the author's own, not published"
    )
    return Facts(
        trained=trained,
        run=read_run(trained.run) if trained.run is not None else None,
        base_id=found,
        base_name=found or Path(name).name,
        base_commit=saved.get("revision") if found == name else None,
        base_licence=licence or (LICENCES[found][1] if found in LICENCES else None),
        data_id=data_id,
        data_name=data_name,
        data_licence=data_licence or (LICENCES[source][1] if source in LICENCES else None),
        evaluated=newest_evaluation(trained),
        merge=None if merged is None else merge_of(trained, merged),
    )


def is_hub_id(name: str) -> bool:
    """owner/name, and no path on this machine."""
    files = (".csv", ".json", ".jsonl", ".parquet")
    return (
        name.count("/") == 1
        and not name.startswith(("/", ".", "~"))
        and not name.lower().endswith(files)
        and not Path(name).exists()
    )


def newest_evaluation(trained: Trained) -> dict[str, Any] | None:
    """Of the run's own held-out rows rather than of others; of these very weights only."""
    if trained.run is None:
        return None
    wanted, found = adapter_hash(trained), []
    for path in sorted((trained.run / "evaluated").glob("*.json")):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}): remove it, and run glassloop evaluate again"
            ) from error
        if isinstance(one, dict) and one.get("adapter") == wanted:
            found.append(
                (bool(one.get("own_heldout")), int(one.get("answered", 0)), path.name, one)
            )
    return max(found, key=lambda entry: entry[:3])[3] if found else None


def merge_of(trained: Trained, folder: Path) -> dict[str, Any]:
    """Facts of a folder that `glassloop merge` wrote from this adapter."""
    path = folder / "glassloop_merge.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--merged {folder} has no readable glassloop_merge.json: name a folder that glassloop merge wrote"
        ) from error
    if found.get("adapter") != adapter_hash(trained):
        raise ValueError(
            f"--merged {folder} was merged from another adapter (update {found.get('update')}) than {trained.checkpoint}: merge again"
        )
    check_weights(folder)
    return found


def check_weights(folder: Path) -> None:
    """Raise ValueError for a merged folder of which a file is missing, cut short, or without a tensor that the index names."""
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
                f"--merged {folder}: {path.name} lacks {lost[0]} ({len(lost)} such tensors): merge again"
            )
