"""The way to the state before any recorded update.

From its capsule, else from the nearest earlier checkpoint, else from the beginning.

What lies between is re-run and compared with the record on the way. Whether an update
was applied, and with which clip coefficient, is taken from its record, so that skips and reactions
of the run are repeated and not decided anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glassloop.config import Config
from glassloop.data.batches import Window
from glassloop.data.rows import Row
from glassloop.disk.environment import PACKAGES, package_version
from glassloop.disk.opening import read_plain
from glassloop.record.reading import file_of, is_run, read_config, trajectory, usual, with_overrides
from glassloop.replay.replica import Parts, make_parts, state_of
from glassloop.replay.reproduce import Scene, recorded_numbers
from glassloop.replay.rerun import OnTheWay, Say, load_rows, rerun
from glassloop.saved.capsule import (
    Capsule,
    CapsuleFacts,
    find_capsules,
    read_capsule,
    read_facts,
    restore_capsule,
    row_digest,
    versions,
)

# Relative, of losses and norms: other sums by place. bf16 rounds each product.
SHARED_ROUNDING = {"fp32": 1e-6, "bf16": 1e-3}


@dataclass(frozen=True)
class Opened:
    """The scene of the update, and what to compare it with."""

    scene: Scene
    config: Config
    text: str  # record.text
    # Loss in nats a token and gradient norm of sound updates; None if none are known.
    usual: tuple[float, float] | None
    usual_from: str  # where these come from, for people
    healthy: Scene | None  # of the healthy capsule, over the same parts
    on_the_way: tuple[OnTheWay, ...]
    notes: tuple[str, ...]  # what differs from the surroundings of the run


def open_scene(
    where: Path, update: int | None, overrides: Mapping[str, str], say: Say = lambda _line: None
) -> Opened:
    """Everything that a replay of `update` needs.

    Args:
        where: a run's folder, or that of a capsule (then `update` may be None).
        overrides: fields of the recorded config to replace, such as {"model.id": "/models/base"}.

    Raises:
        ValueError: there is no such update, or base or data are not those of the run; names what
            and the cure.
    """
    path = where if (where / "capsule.json").exists() else None
    folder = where if path is None else where.resolve().parent.parent
    run_folder = folder if is_run(folder) else None
    if path is None and run_folder is None:
        raise ValueError(
            f"{where} is neither a run's folder (metrics.jsonl and config.yaml) nor a "
            "capsule's (capsule.json): name one of them"
        )
    notes: list[str] = []
    if path is not None:
        capsule = read_capsule(path)
        if update not in (None, capsule.facts.update):
            raise ValueError(
                f"--update {update}: {path} holds update {capsule.facts.update}; leave "
                "--update out, or name the run"
            )
    else:
        if update is None:
            raise ValueError(
                f"--update is missing: which update of {where} is to be replayed? "
                f"{_capsules_of(where)}"
            )
        capsule = _own_capsule(where, update, notes)
    if capsule is not None:
        return _as_shared(_from_capsule(capsule, run_folder, overrides, notes))
    assert run_folder is not None
    assert update is not None
    return _as_shared(_from_run(run_folder, update, overrides, say, notes))


def _as_shared(opened: Opened) -> Opened:
    """Allow for rounding where ranks shared passes, which one process computes whole."""
    execution, ranks = opened.config.execution, opened.scene.ranks
    if execution.layout != "split" or ranks == 1:
        return opened
    note = f"{ranks} ranks shared its passes; here one computes them whole, equal up to rounding"
    scene = replace(opened.scene, rounding=SHARED_ROUNDING[execution.precision])
    return replace(opened, scene=scene, notes=(*opened.notes, note))


def _capsules_of(folder: Path) -> str:
    held = [
        f"{facts.update} ({facts.why})"
        for path in find_capsules(folder / "capsules")
        if (facts := _facts(path))
    ]
    return (
        f"Capsules hold {', '.join(held)}; any other is re-run"
        if held
        else "No capsule was kept; any update can be re-run"
    )


def _facts(path: Path) -> CapsuleFacts | None:
    try:
        return read_facts(path)
    except ValueError:
        return None


def _own_capsule(folder: Path, update: int, notes: list[str]) -> Capsule | None:
    """The update's capsule, if it is whole and fits the record.

    It fits if it is of the same attempt.
    """
    path = folder / "capsules" / f"update_{update:06d}"
    if not path.is_dir():
        return None
    try:
        capsule = read_capsule(path)
        record = trajectory(folder, update)[update]
    except ValueError as error:
        notes.append(f"{error}; the update is re-run instead")
        return None
    if record["attempt"] != capsule.facts.attempt:
        notes.append(
            f"{path} is of attempt {capsule.facts.attempt}, the record's last is "
            f"{record['attempt']}: the update is re-run"
        )
        return None
    return capsule


def _from_capsule(
    capsule: Capsule, folder: Path | None, overrides: Mapping[str, str], notes: list[str]
) -> Opened:
    facts = capsule.facts
    config = with_overrides(facts.config, overrides)
    if not torch.cuda.is_available() and facts.versions.get("threads", "").isdigit():
        # Sums are split among threads: the bits depend on it.
        torch.set_num_threads(max(1, int(facts.versions["threads"])))
    rows = _rows_of(facts, config)
    parts = make_parts(config, None, pad_id=facts.pad_id, rows=tuple(rows.values()))
    _check_base(parts, facts.base_hash, f"capsule {capsule.path}")
    scene = _capsule_scene(capsule, parts, rows, config.record.text)
    here = versions(parts.replica.device)
    notes += [
        f"made with {name} {was}, here {here[name]}"
        for name, was in facts.versions.items()
        if here.get(name, was) != was
    ]
    healthy = _healthy(capsule.path.parent, facts, parts, config, notes)
    known = (
        usual(trajectory(folder, facts.update), facts.update)
        if folder and _on_record(folder, facts)
        else None
    )
    usual_from = "medians of the applied updates before it"
    if known is None and healthy is not None:
        known = healthy.recorded["loss"], healthy.recorded["gradient norm"]
        usual_from = f"the healthy update {healthy.update}"
    return Opened(scene, config, config.record.text, known, usual_from, healthy, (), tuple(notes))


def _on_record(folder: Path, facts: CapsuleFacts) -> bool:
    try:
        return trajectory(folder, facts.update)[facts.update]["attempt"] >= facts.attempt
    except ValueError:
        return False


def _healthy(
    folder: Path, facts: CapsuleFacts, parts: Parts, config: Config, notes: list[str]
) -> Scene | None:
    """The newest healthy capsule beside this one that fits the same parts."""
    known = [
        (other.serial, path)
        for path in find_capsules(folder)
        if (other := _facts(path)) and other.why == "healthy"
    ]
    for _, path in sorted(known, reverse=True):
        try:
            capsule = read_capsule(path)
            if capsule.facts.update == facts.update or capsule.facts.base_hash != facts.base_hash:
                continue
            rows = _rows_of(capsule.facts, config)
            return _capsule_scene(capsule, parts, rows, config.record.text)
        except ValueError as error:
            notes.append(f"the healthy capsule cannot be compared with: {error}")
    return None


def _capsule_scene(capsule: Capsule, parts: Parts, rows: Mapping[int, Row], text: str) -> Scene:
    facts = capsule.facts
    restore_capsule(capsule, adapters=parts.replica.adapters, optimizer=parts.replica.optimizer)
    parts.replica.scale.value = facts.loss_scale
    index = {number: place for place, number in enumerate(rows)}
    passes = tuple(
        tuple(tuple(index[number] for number in one) for one in rank) for rank in facts.passes
    )
    order = tuple(row for rank in passes for one in rank for row in one)
    window = Window(facts.update, facts.epoch, order, passes, facts.packed)
    names = tuple(row.row_id if text != "none" else f"row {number}" for number, row in rows.items())
    scene = Scene(
        parts=parts,
        update=facts.update,
        window=window,
        rows=tuple(rows.values()),
        row_names=names,
        state=state_of(parts, capsule.rng_states),
        lr=facts.lr,
        max_grad_norm=facts.max_grad_norm,
        recorded={},
        origin=f"its capsule {capsule.path} ({facts.why})",
    )
    expected = facts.expected
    rank_losses = [
        total / tokens if (tokens := scene.rank_tokens(rank)) else None
        for rank, total in enumerate(expected.rank_loss_sums)
    ]
    row_losses = [loss for losses in expected.row_loss_sums for loss in losses]
    numbers = recorded_numbers(
        scene,
        expected.loss_nats,
        expected.grad_norm_pre_clip,
        rank_losses,
        expected.rank_grad_norms,
        row_losses,
    )
    return replace(scene, recorded=numbers)


def _rows_of(facts: CapsuleFacts, config: Config) -> dict[int, Row]:
    """The capsule's rows by number.

    From the data if it carries none; each is checked against its digest.
    """
    if facts.rows:
        return dict(facts.rows)
    rows, _, _ = load_rows(config)
    numbers = [number for rank in facts.passes for one in rank for number in one]
    changed = [n for n in numbers if n >= len(rows) or row_digest(rows[n]) != facts.digests[n]]
    if changed:
        raise ValueError(
            f"data.source = {config.data.source} has changed since update {facts.update}: "
            f"row {changed[0]} "
            f"({len(changed)} of {len(numbers)} rows) is another one now, and the capsule "
            "carries no tokens "
            "(record.text = none): replay it with the data as they were"
        )
    return {number: rows[number] for number in numbers}


def _check_base(parts: Parts, base_hash: str, owner: str) -> None:
    here = parts.replica.plain_engine.report.base_hash
    if here != base_hash:
        raise ValueError(
            f"model.id = {parts.config.model.id} has changed, or is another base: {owner} "
            f"was made on {base_hash[:16]}, "
            f"this is {here[:16]}; name the base that it was made on with --base"
        )


def _from_run(
    folder: Path, update: int, overrides: Mapping[str, str], say: Say, notes: list[str]
) -> Opened:
    chain = trajectory(folder, update)
    kept = file_of(folder, chain[update], "config.yaml")
    config = with_overrides(read_config(folder, kept), overrides)
    if others := sorted(u for u in chain if file_of(folder, chain[u], "config.yaml") != kept):
        notes.append(f"updates up to {others[-1]} ran with other settings than {kept} has")
    scene, on_the_way = rerun(folder, chain, config, overrides, say, notes)
    notes += _other_packages(folder)
    healthy = None
    for path in reversed(find_capsules(folder / "capsules")):
        facts = _facts(path)
        if facts is not None and facts.why == "healthy" and facts.update != update:
            healthy = _healthy(
                path.parent, replace(facts, update=update), scene.parts, config, notes
            )
            break
    usual_from = "medians of the applied updates before it"
    return Opened(
        scene,
        config,
        config.record.text,
        usual(chain, update),
        usual_from,
        healthy,
        on_the_way,
        tuple(notes),
    )


def _other_packages(folder: Path) -> list[str]:
    """Packages that env.json has in other versions than are installed here."""
    try:
        saved = json.loads(read_plain(folder / "env.json"))["packages"]
    except (OSError, ValueError, KeyError):
        return []
    here = {name: package_version(name) for name in PACKAGES}
    return [
        f"made with {name} {saved[name]}, here {here[name]}"
        for name in PACKAGES
        if saved.get(name, here[name]) != here[name]
    ]
