"""env.json: what it holds, and what never gets into it."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glassloop.config import Config, as_dict
from glassloop.disk import environment as module
from glassloop.disk.environment import environment, git_commit, nvidia_driver
from glassloop.disk.secrets import command_line, without_secrets


def test_it_names_versions_gpus_driver_and_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = SimpleNamespace(name="NVIDIA GeForce RTX 3090", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "PACKAGES", ("torch", "datasets", "no-such-package"))
    env = environment(["train_loop.py", "r1_8b_scam"])
    assert env["packages"] == {
        "torch": metadata.version("torch"),
        "datasets": metadata.version("datasets"),
        "no-such-package": None,
    }
    assert env["python"] == platform.python_version()
    assert env["driver"] == "580.65.06"
    assert env["gpus"] == [{"name": "NVIDIA GeForce RTX 3090", "memory_gib": 24.0}] * 2
    assert env["command"] == ["train_loop.py", "r1_8b_scam"]
    assert env["schema"] == 1
    json.dumps(env)


def test_every_package_of_the_run_is_named() -> None:
    assert set(module.PACKAGES) == {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "datasets",
    }


def test_it_holds_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    uname = SimpleNamespace(
        system="Linux",
        node="secret-host",
        release="6.1",
        version="#1",
        machine="x86_64",
        processor="",
    )
    monkeypatch.setattr(platform, "uname", lambda: uname)
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    assert "secret-host" not in json.dumps(environment([]))


@pytest.mark.parametrize("script", ["#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n", None])
def test_without_a_driver_it_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_driver() is None


def test_the_commit_is_that_of_the_file_and_of_no_folder_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    git = [
        "git",
        "-C",
        str(tmp_path),
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
    ]
    subprocess.run([*git, "init", "-q"], check=True)
    tracked, installed = tmp_path / "loop.py", tmp_path / "venv" / "loop.py"
    installed.parent.mkdir()
    tracked.write_text("a")
    installed.write_text("a")
    assert git_commit(tracked) is None
    subprocess.run([*git, "add", "loop.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert git_commit(tracked) == {"commit": commit, "changed": False}
    assert git_commit(installed) is None  # an environment inside somebody's repository
    tracked.write_text("b")
    assert git_commit(tracked) == {"commit": commit, "changed": True}


SECRETS = {
    "hub token": "hf_" + "aB3" * 11,
    "password of an address": "https://me:hunter2secret@example.com/rows.csv",
    "query of an address": "https://example.com/rows.csv?token=abcdef123&x=1",
    "value of the environment": "0123456789abcdef0123456789abcdef01234567",
}


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
def test_a_secret_in_any_text_is_hidden(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    shown = json.dumps(without_secrets({"data": {"source": [f"see {text} there"]}}))
    assert "(hidden)" in shown
    for part in ("aB3aB3", "hunter2secret", "abcdef123", "0123456789abcdef"):
        assert part not in shown
    assert "see " in shown
    assert " there" in shown


def test_a_secret_on_the_command_line_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-shape")
    words = [
        "train_loop.py",
        "--hub_token",
        "abc",
        "--api-key=def",
        "--data.max_tokens",
        "64",
        "a-token-of-no-known-shape",
    ]
    assert command_line(words) == [
        "train_loop.py",
        "--hub_token",
        "(hidden)",
        "--api-key=(hidden)",
        "--data.max_tokens",
        "64",
        "(hidden)",
    ]


def test_nothing_else_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "TOKENIZERS_PARALLELISM", "adamw_8bit"
    )  # named like a secret only at a glance
    monkeypatch.setenv("SHORT_KEY", "r1")
    config = as_dict(Config(seed=3407))
    assert without_secrets(config) == config
    assert without_secrets({"api_key": "x", "token": None, "max_tokens": 3}) == {
        "api_key": "(hidden)",
        "token": None,
        "max_tokens": 3,
    }
