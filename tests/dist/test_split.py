"""Ranks that share a row's tokens compute what one rank computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from launching import HERE, launch, write_rows

from glassloop.cli.replay import main as replay

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which has no build here"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def split(folder: Path, tiny_llama: Path) -> dict:
    rows = write_rows(folder / "rows.jsonl", 21)
    launch(HERE / "split.py", str(folder), str(tiny_llama), str(rows))
    return json.loads((folder / "split.json").read_text())


def test_every_model_has_the_gradient_of_one_rank_to_1e6(split):
    """Windows, caps, norms on heads, one key head, odd lengths; twice with the same bits."""
    assert len(split["models"]) == 21
    assert {name: far for name, far in split["models"].items() if max(far) > 1e-6} == {}


def test_tiers_and_the_place_of_labels_change_nothing(split):
    """All labels on one rank, on either side of the border, and a pass of two places."""
    found = split["tiers_and_labels"]
    assert len(found) == 8 + 6 + 1
    assert {name: far for name, far in found.items() if max(far) > 1e-6} == {}


def test_a_streamed_base_is_shared_too(split):
    assert max(split["streamed_base"]) <= 1e-6


def test_a_run_trains_as_in_packed_passes(split):
    found = split["runs"]
    packed, shared = found["packed"], found["split"]
    assert packed["code"] == shared["code"] == 0 and found["apart"] < 1e-6
    assert shared["losses"] == pytest.approx(packed["losses"], rel=1e-6)
    assert shared["contract"] == packed["contract"]
    assert shared["rows"].keys() == packed["rows"].keys()
    for name, loss in packed["rows"].items():
        assert shared["rows"][name] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert "split, passes of at most 192 tokens over 2 ranks together" in shared["header"][0]


def test_a_record_counts_each_rows_tokens_once(split):
    one = split["runs"]["split"]["record"]
    rows = split["runs"]["packed"]["record"]
    for name in ("rank_supervised_tokens", "rank_real_tokens"):
        assert sum(one[name]) == sum(rows[name]) and min(one[name]) > 0
    assert abs(one["rank_real_tokens"][0] - one["rank_real_tokens"][1]) <= 4  # one a pass
    assert one["rank_passes"][1] == 0 and one["rank_loss_nats"] == [None, None]
    assert one["rank_grad_norm"] is one["rank_cosine"] is one["noise_scale_tokens"] is None


def test_a_split_run_resumes_to_the_same_losses(split):
    found = split["resumed"]
    assert found[:3] == found[3:] and None not in found


@pytest.mark.parametrize("update", [2, 3])
def test_one_process_replays_what_two_ranks_shared(split, folder, update, capsys):
    """Update 2 from the beginning, update 3 from its capsule."""
    assert split["runs"]["split"]["code"] == 0
    code = replay([str(folder / "runs" / "split"), "--update", str(update), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["reproduces"], found["compared"]
    assert "2 ranks shared its passes" in " ".join(found["notes"])


def test_engines_that_cannot_share_are_refused(split):
    found = split["refusals"]
    assert "execution.layout = split needs execution.engine=fused, and it is peft" in found["peft"]
    assert "auto chose peft (no CUDA GPU)" in found["auto"]
