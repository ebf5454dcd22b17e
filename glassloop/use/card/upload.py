"""Upload of a staged folder to the hub, private unless asked otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.use.card.facts import HUB_ID


@dataclass(frozen=True)
class Uploaded:
    """The hub's answer to an upload.

    `private` is as the hub says. `removed` names files of an earlier upload that would have been
    loaded with this one.
    """

    address: str
    private: bool
    removed: tuple[str, ...]


def check_repo(repo: str) -> None:
    """Raise ValueError for a name that the hub would not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    cure = "name it owner/name (letters, digits, -, _ and .)"
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"REPO = {repo}: {cure}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"REPO = {repo}: {cure}; {error}") from error


def login(api: Any = None) -> Any:
    """Return the hub's API.

    Raises:
        ValueError: the hub is out of reach or knows no token.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError

    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "there is no token for the hub on this machine: hf auth login, or set HF_TOKEN; or "
            "--dry-run FOLDER"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ValueError(
            f"the hub does not know you, or cannot be reached ({_first_line(error)}): hf auth "
            "login; or --dry-run FOLDER"
        ) from error
    return api


def upload(
    api: Any,
    folder: Path,
    names: list[str],
    repo: str,
    *,
    public: bool,
    message: str,
    stale: Callable[[str], bool],
) -> Uploaded:
    """Upload `names` in one commit; make the repository if it is missing.

    Args:
        api: what login() returned.
        stale: whether a file that only the repository has would be loaded with the upload; the same
            commit removes it.

    Raises:
        ValueError: no right to write, the hub is out of reach, or the repository is public and
            `public` was not given.
    """
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.model_info(repo).private)
        removed = sorted(
            name for name in api.list_repo_files(repo) if name not in names and stale(name)
        )
    except Exception as error:
        raise ValueError(
            f"REPO = {repo} cannot be made or read ({_first_line(error)}): name one that you may "
            "write to"
        ) from error
    if not public and not private:
        raise ValueError(
            f"REPO = {repo} is public, so what is uploaded would be too: give --public if you mean "
            "it, or name another repository"
        )
    try:
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=names,
            delete_patterns=removed or None,
            commit_message=message,
        )
    except Exception as error:
        raise ValueError(
            f"REPO = {repo}: the upload failed ({_first_line(error)}); type the command again, "
            "what arrived is not sent twice"
        ) from error
    return Uploaded(f"https://huggingface.co/{repo}", private, tuple(removed))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
