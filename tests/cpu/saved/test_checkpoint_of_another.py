"""A checkpoint of another run is refused; free fields may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BASE, CONFIG, RANKS, Bench, bench, forge, load, refused, save, state_at

from glassloop.saved.changes import config_changes
from glassloop.saved.run_state import RunState


def test_the_numbers_of_each_rank_must_be_listed(at_40: Path, other: Bench) -> None:
    lines = (at_40 / "SHA256SUMS").read_text().splitlines(keepends=True)
    (at_40 / "SHA256SUMS").write_text("".join(line for line in lines if "rng_rank0" not in line))
    assert "does not list rng_rank0.json" in refused(at_40, other)


def test_another_number_of_ranks_is_refused_with_both(at_40: Path, other: Bench) -> None:
    message = refused(at_40, other, world_size=3)
    assert "saved by 2 ranks, this run has 3" in message
    assert "--num_processes 2" in message


def test_another_base_is_refused_with_both(at_40: Path, other: Bench) -> None:
    message = refused(at_40, other, base_hash="sha256:else")
    assert BASE in message
    assert "sha256:else" in message


def test_another_model_is_refused(at_40: Path) -> None:
    assert "adapter_model.safetensors" in refused(at_40, bench(r=4))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_another_optimizer_is_refused(name: str, at_40: Path) -> None:
    message = refused(at_40, bench(name))
    assert "AdamW8bit" in message


def changed_config(field: str, value: Any) -> dict[str, Any]:
    plain = json.loads(json.dumps(CONFIG))
    section, _, name = field.rpartition(".")
    (plain[section] if section else plain)[name] = value
    return plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("model.id", "org/other"),
        ("model.quantization", "none"),
        ("lora.alpha", 32.0),
        ("lora.targets", ["q_proj"]),
        ("data.rows", 7),
        ("data.columns", {"question": "q"}),
        ("batch.size", 4),
        ("schedule.updates", 120),
        ("optimizer.lr", 1e-3),
        ("optimizer.max_grad_norm", None),
    ],
)
def test_a_field_that_says_what_an_update_computes_is_refused_with_both_values(
    field: str, value: Any, at_40: Path, other: Bench, scratch: Bench
) -> None:
    config = changed_config(field, value)
    (changed, (old, new)), *_ = config_changes(CONFIG, config).items()
    message = refused(at_40, other, config=config)
    assert f"{changed} was {old!r} and now is {new!r}" in message
    allowed = list(config_changes(CONFIG, config))
    load(at_40, scratch, config=config, allow_changed=allowed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "mine"),
        ("execution.layout", "packed"),
        ("execution.checkpointing", False),
        ("record.text", "full"),
        ("tracking.to", ["wandb"]),
        ("evaluation.every_updates", 5),
        ("checkpoint.keep", 1),
        ("stability.on_nonfinite", "skip"),
        ("run.name", "other"),
        ("resume.run", "runs/other"),
        ("model.cache_dir", "/cache"),
        ("model.init_adapter", "adapter"),
        ("batch.ranks", 2),
    ],
)
def test_a_field_that_does_not_is_free(field: str, value: Any, at_40: Path, scratch: Bench) -> None:
    assert load(at_40, scratch, config=changed_config(field, value)).update == 40


def test_changes_are_found_whatever_the_container() -> None:
    assert config_changes({"a": {"b": (1, 2)}, "c": 1}, {"a": {"b": [1, 2]}, "c": 1}) == {}
    assert config_changes({"a": {"b": 1}, "c": 1}, {"a": {"d": 2}, "c": 1}) == {
        "a.b": (1, None),
        "a.d": (None, 2),
    }


def test_a_state_written_without_later_fields_opens(at_40: Path, scratch: Bench) -> None:
    later = (
        "versions",
        "attempt",
        "loss_scale",
        "finite_updates",
        "heldout_loss_nats",
        "tracker_ids",
        "details",
        "serial",
    )
    forge(
        at_40,
        "state.json",
        lambda s: (
            {"order_seed": 3407}  # older ones have it
            | {name: value for name, value in s.items() if name not in later}
        ),
    )
    assert load(at_40, scratch) == RunState(40, 0, RANKS, BASE, CONFIG)


def test_a_field_that_an_older_version_did_not_know_may_have_its_default_now(
    tmp_path: Path, trained: Bench, tokenizer: Any, other: Bench, scratch: Bench
) -> None:
    old = changed_config("seed", 3407)
    del old["schedule"]["warmup_share"], old["data"]["columns"]["question"]
    saved = save(tmp_path, trained, tokenizer, state_at(20, config=old)).path
    message = refused(saved, other, config=changed_config("schedule.warmup_share", 0.5))
    assert "schedule.warmup_share was None and now is 0.5" in message
    assert load(saved, scratch).update == 20
