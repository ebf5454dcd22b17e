"""Ranks that do not meet are a sentence with address and cure, and never wait without a word."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from glassloop.loop import meeting
from glassloop.loop.meeting import meet


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> int:
    """Two ranks in the environment, of which this one is rank 1; returns a port nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


@pytest.fixture
def listening(announced: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", announced)):
        yield


def test_a_rank_0_that_never_comes_is_named_with_the_cure(announced: int) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="rank 1 of 2 did not meet the others at 127") as missed:
        meet(lambda: pytest.fail("it joined nobody"), 1)
    assert 1 <= time.monotonic() - began < 5
    told = str(missed.value)
    assert f"127.0.0.1:{announced} within 1 s" in told
    assert "start all 2 with `accelerate launch`" in told
    assert "unset RANK, LOCAL_RANK and WORLD_SIZE" in told
    assert "Connection refused" in told


def test_a_launcher_that_is_gone_is_named_soon(
    announced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "0")  # under a launcher, rank 0 waits for it too
    monkeypatch.setattr(meeting, "LAUNCHER_S", 0.5)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"launcher of this rank is gone: .*127.0.0.1:{announced}"
    ):
        meet(lambda: pytest.fail("it joined nobody"), 1800)
    assert time.monotonic() - began < 10


def test_a_rank_1_that_never_comes_is_named_by_rank_0(
    announced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    second = timedelta(seconds=1)
    with pytest.raises(ValueError, match=r"rank 0 of 2 did not meet .*1/2 clients joined\.\)$"):
        meet(lambda: dist.init_process_group("gloo", timeout=second), 1)


@pytest.mark.usefixtures("listening")
def test_other_errors_of_the_start_stay_what_they_are() -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        meet(broken, 9)


@pytest.mark.usefixtures("listening")
def test_a_long_wait_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "NOTE_S", 0.1)
    assert meet(lambda: time.sleep(0.5) or "joined", 9) == "joined"
    assert "rank 1 of 2 waits for the other ranks at 127.0.0.1:" in capsys.readouterr().err
    monkeypatch.setattr(meeting, "NOTE_S", 60)
    meet(lambda: None, 9)
    assert capsys.readouterr().err == ""


def test_a_number_that_is_none_is_named(announced: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE='two', which is no number: unset it"):
        meet(lambda: None, 1)


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert meet(lambda: 5, 1) == 5
