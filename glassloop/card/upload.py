"""A staged folder to the hub: into a private repository, unless a public one was asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repo(repo: str) -> None:
    if not REPO.fullmatch(repo):
        raise ValueError(f"REPO = {repo}: name it owner/name (letters, digits, -, _ and .)")


def upload(folder: Path, names: list[str], repo: str, *, public: bool, message: str, api: Any = None) -> str:
    """Make the repository where it is missing, check that it is as private as asked, upload `names` in one commit. Returns its address.

    Raises:
        ValueError: not logged in, no right to write, the hub is out of reach, or the repository is public and --public was not given.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ValueError(
            f"the hub does not know you, or cannot be reached ({_first_line(error)}): hf auth login; or --dry-run FOLDER"
        ) from error
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.model_info(repo).private)
    except Exception as error:
        raise ValueError(
            f"REPO = {repo} cannot be made or read ({_first_line(error)}): name one that you may write to"
        ) from error
    if not public and not private:
        raise ValueError(
            f"REPO = {repo} is public, so what is uploaded would be too: give --public if you mean it, or name another repository"
        )
    try:
        api.upload_folder(repo_id=repo, folder_path=str(folder), allow_patterns=names, commit_message=message)
    except Exception as error:
        raise ValueError(
            f"REPO = {repo}: the upload failed ({_first_line(error)}); type the command again, what arrived is not sent twice"
        ) from error
    return f"https://huggingface.co/{repo}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
