"""A trained adapter, opened for use: its checkpoint, config, template and model.

The template is found without the run's data. The checkpoint's own chat template says if prompts
open a think block; prompts are then encoded by the code for training rows, so that text which looks
like a control token stays text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from glassloop.config import Config
from glassloop.config.trust import OPTIONS
from glassloop.data.rows import Example, Turn
from glassloop.data.templates import Template, make_template
from glassloop.disk import publish as folders
from glassloop.plan.steps import counted
from glassloop.record.reading import with_overrides
from glassloop.saved.checkpoint import (
    ADAPTER,
    REQUIRED,
    best_checkpoint,
    last_checkpoint,
    read_state,
)
from glassloop.saved.run_state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """One checkpoint, whole: its sums were checked.

    Attributes:
        run: folder of its run; None if the checkpoint stands alone.
        config: as it was trained; fields given now replace those that say where things are.
        why: how this checkpoint was chosen, for people.
        notes: what a person should know, a line each.
    """

    run: Path | None
    checkpoint: Path
    state: RunState
    config: Config
    why: str
    notes: tuple[str, ...]
    files: tuple[str, ...]  # names of all of its files

    @property
    def scale(self) -> float:
        return self.config.lora.scale


def open_trained(
    where: Path, at: int | None = None, overrides: Mapping[str, str] | None = None
) -> Trained:
    """Find and check the checkpoint that `where` means.

    Args:
        where: a run's folder: its best checkpoint by held-out loss, or its newest if none was
            measured; or a checkpoint's own folder.
        at: the checkpoint after this many updates instead.
        overrides: fields of the recorded config to replace, such as {"model.id": "/models/base"}.

    Raises:
        ValueError: no folder, no run, no whole checkpoint, or its config asks for what only a
            command line may ask for; names the folder and the cure.
    """
    if not where.is_dir():
        raise ValueError(
            f"RUN = {where} is no folder: name a run's folder (runs/NAME), or one of its "
            "checkpoints"
        )
    notes: list[str] = []
    if (where / "state.json").is_file():
        if at is not None:
            raise ValueError(
                f"--at {at}: RUN = {where} is a checkpoint already; remove --at, or name the run's "
                "folder"
            )
        path, why = where, "the one named"
    else:
        path, why = _choose(where, at, notes)
    files = whole_checkpoint(path)
    state = read_state(path)
    run = path.absolute().parent.parent
    return Trained(
        run=run if (run / "metrics.jsonl").is_file() else None,
        checkpoint=path,
        state=state,
        config=with_overrides(state.config, overrides or {}, OPTIONS),
        why=why,
        notes=tuple(notes),
        files=tuple(files),
    )


def _choose(where: Path, at: int | None, notes: list[str]) -> tuple[Path, str]:
    if not (where / "checkpoints").is_dir():
        what = (
            "holds no checkpoint yet"
            if (where / "config.yaml").is_file()
            else "is neither a run's folder nor a checkpoint's"
        )
        if (where / "adapter_config.json").is_file():
            what = (
                "is an adapter, but no checkpoint of glassloop (it has no state.json, which says "
                "its data, template and base)"
            )
        if (where / "glassloop_merge.json").is_file():
            what = (
                "is what glassloop merge wrote: plain weights, which transformers and vLLM load, "
                "and no run"
            )
        raise ValueError(
            f"RUN = {where} {what}: name a run's folder with checkpoints/ in it (runs/NAME), or "
            "one of its checkpoints"
        )
    if at is not None:
        path = where / "checkpoints" / f"update_{at:06d}"
        if not path.is_dir():
            held = sorted(
                p.name.removeprefix("update_").lstrip("0") or "0"
                for p in path.parent.glob("update_*")
            )
            raise ValueError(
                f"--at {at}: {where} has no checkpoint after {counted(at, 'update')}; it has "
                f"{', '.join(held) or 'none'}"
            )
        return path, "the one asked for"
    last, passed_over = last_checkpoint(where)
    notes += passed_over
    if last is None:
        raise ValueError(
            f"RUN = {where} has no whole checkpoint "
            f"({'; '.join(passed_over) or 'checkpoints/ is empty'}): "
            "resume the run until it saves one (--resume), or name another run"
        )
    best = best_checkpoint(where)
    if best is None:
        return last, "the newest"
    return best, "the best by held-out loss" + (
        "" if best == last else f"; the newest is {last.name}: --at {read_state(last).update}"
    )


def whole_checkpoint(path: Path) -> list[str]:
    """Return the names of a checkpoint's files, whose sums were checked.

    Raises:
        ValueError: a sum is wrong or a file missing; names folder, file and cure.
    """
    try:
        return list(folders.read(path, REQUIRED))
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} is not whole: {error}; take another checkpoint of the run (--at N)"
        ) from error


def load_tokenizer_of(trained: Trained) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the adapter, with training's chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(trained.checkpoint), trust_remote_code=trained.config.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {trained.checkpoint}: its tokenizer cannot be loaded ({str(error)[:200]})"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def template_of(trained: Trained, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Rebuild the template that the adapter was trained with.

    Raises:
        ValueError: this glassloop writes no such template.
    """
    saved = tokenizer.chat_template
    asked = Turn("user", "How many legs has a spider?")
    tried: list[Exception] = []
    for reasoning in ("A spider is an arachnid.", None):
        probe = Example("probe", (asked, Turn("assistant", "It has eight.", reasoning)))
        try:
            template = make_template(trained.config.data, tokenizer, [probe])
        except ValueError as error:  # a chat template may refuse reasoning
            tried.append(error)
            continue
        if template.chat_template == saved:
            return template
    reason = f": {tried[0]}" if tried else ""
    raise ValueError(
        f"checkpoint {trained.checkpoint}: its chat_template.jinja is not the one that "
        f"data.template = {trained.config.data.template} "
        f"writes{reason}; use the glassloop that trained it, or restore the file"
    )


def adapter_weights(trained: Trained) -> dict[str, torch.Tensor]:
    """fp32 matrices by PEFT's saved names."""
    try:
        return safetensors.torch.load((trained.checkpoint / ADAPTER).read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {trained.checkpoint}: {ADAPTER} cannot be read ({error}): choose another "
            "checkpoint"
        ) from error


def with_data(trained: Trained, **fields: Any) -> Trained:
    """The same adapter with other fields of its data section."""
    data = trained.config.data.model_copy(update=fields)
    return replace(trained, config=trained.config.model_copy(update={"data": data}))


def adapter_hash(trained: Trained) -> str:
    """16 hex digits of the adapter's file."""
    return hashlib.sha256((trained.checkpoint / ADAPTER).read_bytes()).hexdigest()[:16]


def adapter_config(trained: Trained) -> dict[str, Any]:
    """adapter_config.json of the checkpoint."""
    with contextlib.suppress(ValueError):
        found = json.loads((trained.checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise ValueError(
        f"checkpoint {trained.checkpoint}: adapter_config.json holds no fields: choose another "
        "checkpoint"
    )
