"""Trackers that could not start are refused, with the cure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from glassloop.config import TrackingConfig
from glassloop.record import tracker_checks
from glassloop.record.tracker_checks import check_tracking, has_wandb_login

pytestmark = pytest.mark.usefixtures("own_home")

KEY = "0123456789abcdef0123456789abcdef01234567"


def online(**changes: Any) -> TrackingConfig:
    return TrackingConfig(to=("wandb",), **changes)


def test_no_tracker_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_checks, "package_version", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    check_tracking(TrackingConfig())


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: Any
) -> None:
    (tmp_path / name).mkdir()  # a folder of that name, as wandb leaves behind, is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    known = tracker_checks.package_version
    monkeypatch.setattr(
        tracker_checks,
        "package_version",
        lambda one: None if one in (name, "tensorboardX") else known(one),
    )
    with pytest.raises(
        ValueError, match=rf"tracking\.to.*{name} is not installed: pip install {name}"
    ):
        check_tracking(TrackingConfig(to=(name,), wandb_mode="offline"))


def test_online_without_a_login_is_refused_with_both_cures() -> None:
    with pytest.raises(
        ValueError,
        match=r"tracking\.wandb_mode = online.*`wandb login`.*tracking\.wandb_mode=offline",
    ):
        check_tracking(online())
    check_tracking(online(wandb_mode="offline"))
    check_tracking(TrackingConfig(to=("tensorboard",)))


def netrc(path: Path, host: str) -> None:
    path.write_text(f"machine {host}\n  login user\n  password {KEY}\n")


def test_a_login_is_found_where_wandb_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not has_wandb_login()
    netrc(tmp_path / "home" / ".netrc", "elsewhere.example")
    assert not has_wandb_login()
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", "https://elsewhere.example/")
        assert has_wandb_login()
    with monkeypatch.context() as patch:
        netrc(tmp_path / "other", "api.wandb.ai")
        patch.setenv("NETRC", str(tmp_path / "other"))
        assert has_wandb_login()
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        assert has_wandb_login()
    netrc(tmp_path / "home" / ".netrc", "api.wandb.ai")
    assert has_wandb_login()
    (tmp_path / "home" / ".netrc").write_text(
        "machine"
    )  # malformed: wandb finds no key there either
    assert not has_wandb_login()
    settings = Path(os.environ["WANDB_CONFIG_DIR"]) / "settings"
    settings.parent.mkdir()
    settings.write_text(f"[default]\napi_key = {KEY}\n")
    assert has_wandb_login()
    check_tracking(online())


def test_a_key_is_never_part_of_a_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ValueError, match="WANDB_MODE=disabled") as caught:
        check_tracking(online())
    assert KEY not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("mode", ["disabled", "dryrun"])
def test_an_environment_that_turns_wandb_off_has_the_cure_that_works(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ValueError, match=rf"WANDB_MODE={mode} .* set tracking.to=null"):
        check_tracking(online())
    check_tracking(TrackingConfig(to=()))


@pytest.mark.parametrize(("asked", "said"), [("online", "offline"), ("offline", "online")])
def test_an_environment_that_says_otherwise_is_named(
    monkeypatch: pytest.MonkeyPatch, asked: Any, said: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", said)
    with pytest.raises(ValueError, match=rf"tracking\.wandb_mode = {asked}.*WANDB_MODE={said}"):
        check_tracking(online(wandb_mode=asked))
    monkeypatch.setenv("WANDB_MODE", asked)
    check_tracking(online(wandb_mode=asked))


@pytest.mark.parametrize("project", ["", "a/b", "../x"])
def test_a_project_that_is_no_name_is_refused(project: str) -> None:
    with pytest.raises(ValueError, match=r"tracking\.project"):
        check_tracking(TrackingConfig(to=("tensorboard",), project=project))
