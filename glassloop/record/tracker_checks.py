"""Refuse trackers that could not start, before anything expensive does."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from glassloop.config import TrackingConfig
from glassloop.disk.environment import package_version
from glassloop.record.webhook import webhook_address

PACKAGES = {  # any of these
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
}
NOT_IN_NAMES = '/\\#?%:"<>|'  # characters that a project's name may not hold
WANDB_HOST = "https://api.wandb.ai"


def check_tracking(tracking: TrackingConfig) -> None:
    """Refuse trackers that could not start.

    It reads files and the environment only, so it is quick.

    Raises:
        ValueError: a package is missing, `tracking.project` is no name, WANDB_MODE contradicts
            `tracking.wandb_mode`, or there is no Weights & Biases login for an online run.
    """
    if tracking.webhook is not None:
        webhook_address(tracking.webhook)
    if not tracking.to:
        return
    if not tracking.project.strip() or any(
        char in NOT_IN_NAMES or not char.isprintable() for char in tracking.project
    ):
        raise ValueError(
            f"tracking.project = {tracking.project!r}: must not be empty or hold any of "
            f"{NOT_IN_NAMES}"
        )
    for name in tracking.to:
        if not any(package_version(package) for package in PACKAGES[name]):
            raise ValueError(
                f"tracking.to = {list(tracking.to)}, but the package {name} is not installed: pip "
                f"install {name}, "
                f"or leave {name} out of tracking.to"
            )
    if "wandb" not in tracking.to:
        return
    asked = os.environ.get("WANDB_MODE") or tracking.wandb_mode
    if asked not in ("online", "offline"):
        raise ValueError(
            f"tracking.to = {list(tracking.to)}, but WANDB_MODE={asked} in the environment turns "
            "Weights & Biases off: set tracking.to=null, or unset WANDB_MODE"
        )
    if asked != tracking.wandb_mode:
        raise ValueError(
            f"tracking.wandb_mode = {tracking.wandb_mode}, but the environment says "
            f"WANDB_MODE={asked}: "
            "unset WANDB_MODE, or set tracking.wandb_mode to the same (online or offline)"
        )
    if tracking.wandb_mode == "online" and not has_wandb_login():
        raise ValueError(
            "tracking.wandb_mode = online, but there is no Weights & Biases login (WANDB_API_KEY, "
            ".netrc or wandb's settings): "
            "type `wandb login`, or set tracking.wandb_mode=offline and `wandb sync` the run later"
        )


def has_wandb_login() -> bool:
    """Tell whether wandb would find a key.

    The key itself is neither kept nor checked.
    """
    settings = _wandb_settings()
    if (
        os.environ.get("WANDB_API_KEY")
        or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        or settings.get("api_key")
    ):
        return True
    address = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or WANDB_HOST
    places = (
        [Path(os.environ["NETRC"])]
        if os.environ.get("NETRC")
        else [Path("~/.netrc"), Path("~/_netrc")]
    )
    for path in (place.expanduser() for place in places):
        try:
            entry = netrc.netrc(path).authenticators(urlsplit(address).netloc)
        except (
            OSError,
            netrc.NetrcParseError,
        ):  # missing, unreadable or malformed: wandb finds no key there either
            continue
        if entry is not None and entry[2]:
            return True
    return False


def _wandb_settings() -> dict[str, str]:
    """wandb's settings files, the working folder's above the user's."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(
            [home / "settings", Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"]
        )
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}
