"""Files of data sets on the hub, fetched into its own cache.

The files are then read as local ones are, so that the text of a file is what trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CURE = (
    "a hub id needs network access, the right data.config, data.split and data.revision, and a "
    "login if it is not public; without network, name a local file or folder"
)


@dataclass(frozen=True)
class Repository:
    """A data set's files at one commit; `fetch` gives local paths."""

    names: tuple[str, ...]
    fetch: Callable[[str], Path]
    commit: str | None  # None: of the cached copy


def open_repository(repo: str, revision: str | None, said: str) -> Repository:
    """The files of a data set, of the cached copy without network.

    Raises ValueError naming the field (`said`), the hub's reason and the cure.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = huggingface_hub.HfApi().dataset_info(repo, revision=revision)
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{said} cannot be read: {_reason(error)}; {CURE}") from error
    except Exception as error:  # whatever the HTTP library of the day raises without a hub
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    repo, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
        except Exception:
            raise ValueError(f"{said} cannot be read: {_reason(error)}; {CURE}") from error
        names = (path for path in folder.rglob("*") if path.is_file())
        return Repository(
            tuple(str(path.relative_to(folder)) for path in names),
            lambda name: folder / name,
            None,
        )
    commit = found.sha
    names = tuple(file.rfilename for file in found.siblings or ())

    def fetch(name: str) -> Path:
        try:
            return Path(
                huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit)
            )
        except Exception as error:  # of the HTTP library, or of the disk
            raise ValueError(f"{said}: {name} was not fetched: {_reason(error)}; {CURE}") from error

    return Repository(names, fetch, commit)


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:300] or 'no answer'} ({type(error).__name__})"
