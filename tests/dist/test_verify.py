"""`glassloop verify` passes on a sound tree and names what is wrong in a faulty one.

It ends whatever its processes do.
"""

from __future__ import annotations

import configparser
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from launching import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from glassloop.cli import verify as command
from glassloop.verify import against, results
from glassloop.verify.members import Trace, engines
from glassloop.verify.mutants import MUTANTS
from glassloop.verify.problem import problem_id
from glassloop.verify.results import MARKS, Verdict
from glassloop.verify.worker import Job, attempt

FAULTS = {
    "scheduler_once_per_rank",
    "loss_divided_twice",
    "mean_of_means",
    "unwrapped_forward",
    "tail_as_if_full",
    "labels_shifted_twice",
    "clipping_per_micro_batch",
    "rank_local_skip",
}


def test_a_sound_tree_passes(verified):
    assert verified.code == 0, verified.stderr[-6000:]
    output = verified.output
    assert output["good"] is True
    assert [v["name"] for v in output["verdicts"] if not v["good"]] == []
    assert re.search(
        r"(\d+) of \1 members agree with the formula, 8 of 8 mutants are caught", verified.stderr
    )
    assert re.search(r"two processes \d+ of \d+: ", verified.stderr), "progress"


def test_every_mutant_is_far_beyond_its_mark_or_stopped_by_the_loop(verified):
    mutants = {v["name"]: v for v in verified.output["verdicts"] if v["kind"] == "mutant"}
    assert set(mutants) == {mutant.name for mutant in MUTANTS} == FAULTS
    for name, verdict in mutants.items():
        assert verdict["good"], name
        far = verdict["worst"] is not None and verdict["distances"][verdict["worst"]] > 0.05
        assert far or verdict["stopped_by"], name
    assert "no longer equal before update 3" in mutants["rank_local_skip"]["stopped_by"]
    assert "no longer equal before update 2" in mutants["unwrapped_forward"]["stopped_by"]


def test_a_mutant_is_its_sound_member_but_for_the_fault(verified):
    """Have the member's gradient until the fault sets in: the fault alone is what is caught."""
    distances = {v["name"]: v["distances"] for v in verified.output["verdicts"]}
    for mutant in MUTANTS:
        if mutant.name in ("tail_as_if_full", "rank_local_skip"):
            assert distances[mutant.name]["gradient"] == distances[mutant.sound.name]["gradient"]


def test_the_json_says_where_it_ran_and_has_every_loss_and_norm_with_all_digits(verified):
    output = verified.output
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes"} <= {
        n for n, version in output["versions"].items() if version
    }
    assert output["machine"]["python"] and output["machine"]["system"] and output["device"] == "cpu"
    assert output["problem"] == problem_id()
    assert output["marks"] == {"gradient": 1e-6, "sgd": 2e-6, "adamw_8bit": 1e-3} == MARKS
    series = output["fingerprint"]
    kinds = ("sgd loss_nats", "sgd grad_norm", "adamw_8bit loss_nats", "adamw_8bit grad_norm")
    assert set(series) == {
        f"{task} {kind}" for task in ("nf4", "plain", "clipped") for kind in kinds
    }
    assert all(
        len(numbers) == 5 and all(math.isfinite(n) and n > 0 for n in numbers)
        for numbers in series.values()
    )
    assert any(len(repr(n)) >= 16 for numbers in series.values() for n in numbers)


def test_the_table_has_a_line_for_each_within_100_columns(verified):
    verdicts = [
        Verdict(**{k: v for k, v in one.items() if k != "worst"})
        for one in verified.output["verdicts"]
    ]
    lines = results.table(verdicts)
    assert max(map(len, lines)) <= 100
    for verdict in verdicts:
        (line,) = [line for line in lines if line.startswith(f"{verdict.name}  ")]
        assert line.endswith("ok" if verdict.kind == "member" else "caught")


def test_a_fault_that_all_members_share_is_seen_and_the_moved_numbers_are_named(
    verified, verify_command, tmp_path
):
    """Shift labels twice in a copy of this tree: members agree, but not with the formula."""
    copy = tmp_path / "tree"
    shutil.copytree(
        ROOT / "glassloop", copy / "glassloop", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "train_loop.py", copy)
    with (copy / "glassloop" / "data" / "batches.py").open("a") as file:
        file.write(
            "\n\n_shifted_once = targets\n\n\n"
            "def targets(row):\n    return (*_shifted_once(row)[1:], IGNORE)\n"
        )
    old = tmp_path / "old.json"
    old.write_text(verified.stdout)
    faulty = verify_command(
        "--json", "--only", "plain peft 1x1x8", "--against", str(old), root=copy
    )
    assert faulty.code == 1, faulty.stderr[-6000:]
    output = faulty.output
    assert output["good"] is False
    assert [v["name"] for v in output["verdicts"]] == [
        "plain peft 1x1x8",
        "plain peft 1x1x8 recomputed",
    ]
    for verdict in output["verdicts"]:
        assert not verdict["good"]
        assert verdict["distances"]["gradient"] > 0.1
    assert "0 of 2 members agree with the formula" in faulty.stderr
    assert "plain sgd loss_nats update 1: " in faulty.stderr, "the number that moved, named"
    moved = {move["name"]: move for move in output["against"]}
    assert moved["plain sgd loss_nats update 1"]["beyond_rounding"] is True
    assert not any(name.startswith("nf4") for name in moved), "what --only left out is not compared"


def numbers(**change: float) -> dict[str, list[float | None]]:
    series: dict[str, list[float | None]] = {
        "nf4 sgd loss_nats": [2.0, 3.0],
        "nf4 sgd grad_norm": [1.0, 0.5],
    }
    for name, value in change.items():
        series["nf4 sgd " + name][1] = value
    return series


def test_against_tells_rounding_from_more():
    assert against.moves(numbers(), numbers()) == []
    (small,) = against.moves(numbers(), numbers(loss_nats=3.0 * (1 + 1e-7)))
    (large,) = against.moves(numbers(), numbers(loss_nats=3.0 * (1 + 1e-4)))
    (bad,) = against.moves(numbers(), numbers(grad_norm=math.nan))
    assert (small.beyond_rounding, large.beyond_rounding, bad.beyond_rounding) == (
        False,
        True,
        True,
    )
    assert large.name == "nf4 sgd loss_nats update 2" and large.relative == pytest.approx(1e-4)
    gone = against.moves(numbers(), {"nf4 sgd loss_nats": [2.0, 3.0]})
    assert [(move.name, move.new, move.beyond_rounding) for move in gone] == [
        ("nf4 sgd grad_norm update 1", None, True),
        ("nf4 sgd grad_norm update 2", None, True),
    ]
    facts = {"versions": {"torch": "2.11.0"}, "device": "cpu"}
    said = "\n".join(
        against.lines([small, large], 4, facts, {"versions": {"torch": "2.13.0"}, "device": "cpu"})
    )
    assert (
        "torch 2.11.0 -> 2.13.0" in said
        and "nf4 sgd loss_nats update 2: 3.0 -> 3.0003 moved by 1.0e-04" in said
    )
    assert "1 of 4 numbers moved beyond rounding" in said


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no fingerprint"),
        (
            json.dumps({"schema": against.SCHEMA, "problem": "another", "fingerprint": {}}),
            "make it anew",
        ),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused_before_anything_starts(
    text, complaint, tmp_path
):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        command.main(["--against", str(path)])


def test_it_is_refused_under_a_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="without accelerate launch"):
        command.main([])


def verdict_of(kind: str, facts: dict, mine: dict, tmp_path: Path) -> Verdict:
    """The verdict on a job that left the tensors `mine`, where the formula left 1, 1 each."""
    import numpy
    import safetensors.numpy

    def save(name: str, values: dict) -> None:
        arrays = {what: numpy.array(pair, dtype=numpy.float32) for what, pair in values.items()}
        safetensors.numpy.save_file(arrays, tmp_path / f"{name}.safetensors")

    save("plain formula", {what: [1.0, 1.0] for what in MARKS})
    save("job", mine)
    job = {
        "kind": kind,
        "name": "job",
        "task": "plain",
        "fault": None,
        "fingerprint": False,
        "series": {},
    }
    formula = job | {
        "kind": "formula",
        "name": "plain formula",
        "stopped_by": None,
        "left_out": None,
    }
    jobs = [formula, job | {"began": True, "stopped_by": None, "left_out": None} | facts]
    (tmp_path / "results_1.json").write_text(json.dumps({"environment": {}, "jobs": jobs}))
    ((verdict,), _, _) = results.judge(tmp_path)
    return verdict


SAME = {what: [1.0, 1.0] for what in MARKS}


@pytest.mark.parametrize(
    ("facts", "mine", "agrees"),
    [
        ({}, SAME, True),
        ({}, SAME | {"sgd": [1.0, 1.001]}, False),
        ({}, SAME | {"gradient": [1.0, math.nan]}, False),
        ({"stopped_by": "a guard"}, SAME, False),
        ({"stopped_by": "a guard"}, {}, False),
    ],
    ids=["same", "a change beyond its mark", "not a number", "stopped", "stopped at once"],
)
def test_a_member_is_good_where_a_mutant_is_not(facts, mine, agrees, tmp_path):
    assert verdict_of("member", facts, mine, tmp_path).good is agrees
    mutant = verdict_of("mutant", facts, mine, tmp_path)
    assert mutant.good is not agrees
    assert results.table([mutant])[1].endswith("MISSED" if agrees else "caught")


def test_a_member_that_left_something_out_does_not_agree(tmp_path):
    assert not verdict_of("member", {}, {"gradient": [1.0, 1.0]}, tmp_path).good


def test_a_mutant_that_an_error_kept_from_training_is_not_caught(tmp_path):
    def refuse() -> dict[str, Trace]:
        raise ValueError("the config refuses it")

    facts, _ = attempt(Job("mutant", "loss_divided_twice", "plain", refuse))
    assert facts["stopped_by"] and not facts["began"]
    found = verdict_of(
        "mutant", {name: facts[name] for name in ("stopped_by", "began")}, {}, tmp_path
    )
    assert not found.good and results.table([found])[1].endswith("MISSED")


def test_an_engine_that_is_not_installed_is_left_out_and_said_so(tmp_path):
    def refuse() -> dict[str, Trace]:
        raise ImportError("no module named unsloth")

    facts, _ = attempt(Job("member", "nf4 unsloth 1x1x8", "nf4", refuse, optional=True))
    assert "unsloth" in facts["left_out"] and facts["stopped_by"] is None
    verdict = verdict_of("member", {"left_out": facts["left_out"]}, {}, tmp_path)
    assert "left out" in results.table([verdict])[1]
    assert "0 of 0 members" in results.summary([verdict], 1.0) and "1 left out" in results.summary(
        [verdict], 1.0
    )
    needed, _ = attempt(Job("member", "nf4 peft 1x1x8", "nf4", refuse))
    assert needed["left_out"] is None and "unsloth" in needed["stopped_by"], (
        "the reference engine cannot be left out"
    )


def test_engines_are_those_of_the_config():
    assert engines()[0] == "peft"


def test_the_oldest_versions_tried_are_the_lower_bounds_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = [
        Requirement(line) for line in setup["options"]["install_requires"].splitlines() if line
    ]
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)
    }
    for requirement in asked:
        (bound,) = [
            specifier.version for specifier in requirement.specifier if specifier.operator == ">="
        ]
        assert (pins[canonicalize_name(requirement.name)] + ".").startswith(bound + "."), (
            requirement
        )
