"""Two cards that talk, hang or fail."""

from __future__ import annotations

import os
import time

import pytest
from launching import forking

from glassloop.cli.doctor import check_p2p
from glassloop.doctor import p2p
from glassloop.doctor.findings import NOTE, OK, PROBLEM


def test_an_all_reduce_between_two_processes_is_timed():
    with forking():
        answer = p2p.try_all_reduce("gloo")
    assert answer.outcome == "ok" and 0 < answer.seconds < 30


def test_a_hang_ends_with_the_limit_and_leaves_no_process(monkeypatch, tmp_path):
    stuck = tmp_path / "stuck"
    stuck.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 600\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(p2p.sys, "executable", str(stuck))
    started = time.monotonic()
    assert p2p.try_all_reduce("nccl", limit_s=1.0).outcome == "hang"
    assert time.monotonic() - started < 20
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_fails_says_why():
    with forking():
        answer = p2p.try_all_reduce("no_such_backend", limit_s=60)
    assert answer.outcome == "failed" and answer.seconds < 60
    assert "no_such_backend" in answer.text


def test_when_one_fails_the_other_is_not_waited_for(monkeypatch, tmp_path):
    half = tmp_path / "half"
    half.write_text(
        '#!/bin/sh\nif [ "$3" = 1 ]; then echo no card; exit 3; fi\nexec sleep 20\n'
    )  # -m glassloop.doctor.p2p RANK
    half.chmod(0o755)
    monkeypatch.setattr(p2p.sys, "executable", str(half))
    answer = p2p.try_all_reduce("nccl", limit_s=10)
    assert (answer.outcome, answer.text) == ("failed", "no card")


def test_a_hang_names_the_variable_that_cures_it(monkeypatch):
    tried = []

    def answer(backend="nccl", *, limit_s=30.0, environment=None):
        tried.append(dict(environment or {}))
        return p2p.Answer("ok" if "NCCL_IB_DISABLE" in (environment or {}) else "hang", 1.0)

    monkeypatch.setattr(p2p, "try_all_reduce", answer)
    (found,) = check_p2p(2)
    assert found.level == PROBLEM and "hung for 30 s" in found.text
    assert found.cure.startswith("export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1")
    assert tried == [{}, *p2p.CURES]
    monkeypatch.setattr(p2p, "try_all_reduce", lambda *_, **__: p2p.Answer("hang", 1.0))
    assert "do not help" in check_p2p(2)[0].cure
    monkeypatch.setattr(p2p, "try_all_reduce", lambda *_, **__: p2p.Answer("ok", 0.002))
    assert check_p2p(2)[0].level == OK


def test_one_visible_card_is_not_tried(monkeypatch):
    monkeypatch.setattr(p2p, "try_all_reduce", lambda *_, **__: pytest.fail("started"))
    assert check_p2p(1)[0].level == NOTE
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert check_p2p(4)[0].level == NOTE
