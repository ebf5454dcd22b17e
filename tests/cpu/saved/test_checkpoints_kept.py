"""Which checkpoints are kept, and which one is found."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from checkpoints import Bench, base_model, forge, load, names, save, state_at
from peft import PeftModel

from glassloop.saved.checkpoint import (
    best_checkpoint,
    last_checkpoint,
)

# Which are kept, and which is found


def test_older_ones_go_but_the_best_by_heldout_loss_stays(
    tmp_path: Path, trained: Bench, tokenizer: Any
) -> None:
    losses = {10: 2.0, 20: 1.0, 30: 1.5, 40: None, 50: 1.0000001, 60: math.nan, 70: None}
    for update, loss in losses.items():
        saved = save(tmp_path, trained, tokenizer, state_at(update, heldout_loss_nats=loss), keep=2)
    assert names(tmp_path) == ["update_000020", "update_000060", "update_000070"]
    assert saved.removed == (tmp_path / "checkpoints/update_000050",)
    best = tmp_path / "checkpoints/update_000020"
    assert saved.best == best_checkpoint(tmp_path) == best
    pointer = json.loads((tmp_path / "checkpoints/best.json").read_text())
    assert pointer == {
        "schema": 1,
        "folder": "update_000020",
        "update": 20,
        "heldout_loss_nats": 1.0,
    }
    PeftModel.from_pretrained(base_model(), best)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoints/update_000070", ())
    saved = save(tmp_path, trained, tokenizer, state_at(80, heldout_loss_nats=0.5), keep=1)
    assert names(tmp_path) == ["update_000080"]
    assert saved.best == saved.path


def test_without_heldout_loss_there_is_no_best(run: Path) -> None:
    assert best_checkpoint(run) is None
    assert not (run / "checkpoints/best.json").exists()


def test_after_a_resume_from_an_older_one_its_successors_are_the_newest(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    saved = save(run, trained, tokenizer, state_at(30), keep=2)
    assert names(run) == ["update_000030", "update_000040"]
    assert last_checkpoint(run)[0] == saved.path
    saved = save(run, trained, tokenizer, state_at(35), keep=2)
    assert names(run) == ["update_000030", "update_000035"]
    assert last_checkpoint(run)[0] == saved.path


def test_a_second_checkpoint_of_an_update_takes_the_first_ones_place(
    run: Path, trained: Bench, scratch: Bench, tokenizer: Any
) -> None:
    saved = save(run, trained, tokenizer, state_at(40, attempt=2))
    assert names(run) == ["update_000020", "update_000040"]
    assert load(saved.path, scratch).attempt == 2


def test_one_that_was_replaced_is_removed_by_the_next_save_and_is_never_the_best(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    best = save(run, trained, tokenizer, state_at(40, heldout_loss_nats=2.0)).best
    aside = run / "checkpoints/update_000040.replaced"
    shutil.copytree(run / "checkpoints/update_000040", aside)
    forge(aside, "state.json", lambda s: s | {"serial": 2, "heldout_loss_nats": 1.0})
    assert best_checkpoint(run) == best == aside.with_suffix("")
    assert save(run, trained, tokenizer, state_at(60), keep=3).removed == (aside,)
    assert names(run) == ["update_000020", "update_000040", "update_000060"]


def test_one_that_was_replaced_is_found_while_the_new_one_is_not_there(
    run: Path, scratch: Bench
) -> None:
    (run / "checkpoints/update_000040").rename(run / "checkpoints/update_000040.replaced")
    found, notes = last_checkpoint(run)
    assert (found, notes) == (run / "checkpoints/update_000040.replaced", ())
    assert found is not None
    assert load(found, scratch).update == 40


def test_a_run_without_checkpoints_has_no_last_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) == (None, ())
    assert best_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints/update_000020").mkdir(parents=True)
    found, notes = last_checkpoint(tmp_path)
    assert found is None
    assert "SHA256SUMS is missing" in notes[0]


def test_other_things_in_the_folder_are_neither_read_nor_removed(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    for name in (".ipynb_checkpoints", "update_backup", "mine"):
        (run / "checkpoints" / name).mkdir()
    save(run, trained, tokenizer, state_at(60), keep=1)
    assert names(run) == [".ipynb_checkpoints", "mine", "update_000060", "update_backup"]
    assert last_checkpoint(run) == (run / "checkpoints/update_000060", ())
