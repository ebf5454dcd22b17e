"""The files of a base model, and what its loading errors mean.

A base is a hub commit, a local folder, SmolLM2's package or drawn weights. That is decided before a
weight is read, so all ranks and a later resume mean the same bytes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.base.card_errors import first_line, lacks_memory, of_the_machine
from glassloop.base.files import FileError, check_files, check_no_pointers
from glassloop.base.random import PREFIX, random_folder
from glassloop.base.smollm2 import MODEL_ID, smollm2_folder
from glassloop.config import ModelConfig
from glassloop.disk.cache import cache_root

HUB_TIMEOUT_S = 10.0
# Of reading a file: the system had no room, no descriptor or no permission left.
OF_THE_SYSTEM = (
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
)


class BaseError(ValueError):
    """A ValueError about the base that names field, value and cure."""


@dataclass(frozen=True)
class BaseSource:
    """Files of a base, and the name that its adapters will carry.

    Attributes:
        name: hub id, or the absolute path of a local folder; becomes base_model_name_or_path in
            adapter_config.json.
        commit: hub commit of 40 hex digits; None for a local folder.
        folder: local folder to read; None: transformers downloads name@commit.
        note: what a person should know about this choice; empty where there is nothing.
        drawn: NAME of `random:NAME`, whose folder holds no weights; None for a base that is read.
    """

    name: str
    commit: str | None
    folder: Path | None
    note: str = ""
    drawn: str | None = None

    @property
    def path(self) -> str:
        """First argument of from_pretrained."""
        return self.name if self.folder is None else str(self.folder)

    @property
    def revision(self) -> str | None:
        """Argument `revision` of from_pretrained."""
        return self.commit if self.folder is None else None


def resolve_source(model: ModelConfig) -> BaseSource:
    """Pin `model.id` and `model.revision` to files.

    Asks the hub for a branch's commit; if it is out of reach, takes the downloaded copy. Raises
    BaseError naming model.id (or model.revision) and the cure: unknown, gated, out of reach and not
    on disk.
    """
    if model.id == MODEL_ID:
        folder = smollm2_folder(cache_root(model.cache_dir))
        return BaseSource(name=str(folder), commit=None, folder=folder)
    if model.id.startswith(PREFIX):
        folder = random_folder(model.id, cache_root(model.cache_dir))
        note = "its weights are drawn, not trained: good for timing, not for learning"
        return BaseSource(
            name=str(folder),
            commit=None,
            folder=folder,
            note=note,
            drawn=model.id.removeprefix(PREFIX),
        )
    folder = Path(model.id).expanduser()
    if folder.is_dir():
        if model.revision is not None:
            raise BaseError(
                f"model.revision = {model.revision} means nothing for the local folder model.id = "
                f"{model.id}: leave it out"
            )
        if not (folder / "config.json").is_file():
            raise BaseError(
                f"model.id = {model.id} is a folder without config.json: name the folder that "
                "save_pretrained wrote"
            )
        with _naming(folder):
            check_no_pointers(folder)
        return BaseSource(name=str(folder.absolute()), commit=None, folder=folder.absolute())
    if model.id.startswith(("/", "./", "../", "~")) or model.id.count("/") > 1:
        raise BaseError(
            f"model.id = {model.id} is no folder on this machine: give a hub id (owner/name) or "
            "an existing folder"
        )
    return _hub_source(model)


def _hub_source(model: ModelConfig) -> BaseSource:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = model.revision or "main"
    unreachable = ""
    try:
        commit = HfApi().model_info(model.id, revision=revision, timeout=HUB_TIMEOUT_S).sha
        assert commit is not None
        return BaseSource(name=model.id, commit=commit, folder=None)
    except GatedRepoError as error:
        raise BaseError(_gated(model.id)) from error
    except RevisionNotFoundError as error:
        raise BaseError(
            f"model.revision = {revision} does not exist in {model.id}: give a commit, tag or "
            "branch of it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseError(
            f"model.id = {model.id} is neither a folder nor a model on the hub: check the "
            "spelling (owner/name); "
            "for a private one, log in with `hf auth login`"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises without a hub
        unreachable = f"{type(error).__name__}: {error}"
    cached = try_to_load_from_cache(model.id, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise BaseError(
            f"model.id = {model.id} (revision {revision}) is not on this machine, and the hub "
            f"cannot be reached ({unreachable}): "
            "connect, or set model.id to a local folder"
        )
    snapshot = Path(cached).parent  # .../snapshots/<commit>
    note = (
        f"the hub cannot be reached: using the downloaded copy of {model.id}, commit "
        f"{snapshot.name}"
    )
    return BaseSource(name=model.id, commit=snapshot.name, folder=snapshot, note=note)


def config_of(source: BaseSource, model: ModelConfig) -> dict[str, Any]:
    """Read the base's config as plain values.

    Raises BaseError naming model.id if there is none.
    """
    from transformers import AutoConfig

    check_config(source, model)
    with loading_errors(model):
        return AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model.trust_remote_code
        ).to_dict()


def check_config(source: BaseSource, model: ModelConfig) -> None:
    """Raise BaseError for files from which a library would build something absurd."""
    with loading_errors(model), _naming(model.id):
        check_files(source.path, source.revision, source.folder)


@contextmanager
def _naming(model_id: str | Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise BaseError(f"model.id = {model_id}: {error}") from error


def locate_base(model: ModelConfig) -> tuple[BaseSource, dict[str, Any]]:
    """Source and config of the base.

    A run asks once, before anything is loaded, and passes them on.
    """
    source = resolve_source(model)
    return source, config_of(source, model)


def vocabulary_of(values: dict[str, Any]) -> int:
    """Rows of the embedding, of a base's config."""
    return int((values.get("text_config") or values)["vocab_size"])


def downloaded(source: BaseSource) -> Path:
    """The hub's own folder with a source's files, after the download."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.name, "config.json", revision=source.commit)
    assert isinstance(config, str)  # whoever asks has just loaded it
    return Path(config).parent


def files_of(source: BaseSource) -> Path:
    """Folder with a source's weights; downloads those of a hub id."""
    if source.folder is not None:
        return source.folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(source.name, revision=source.commit, allow_patterns=patterns))


def _gated(name: str) -> str:
    return f"model.id = {name} is gated: accept its licence on its hub page, then `hf auth login`"


@contextmanager
def loading_errors(model: ModelConfig, copy: Path | None = None) -> Iterator[None]:
    """Turn loading errors into a BaseError with field and cure.

    They come from a user's choice or a damaged file. `copy` is the folder of a quantised copy that
    is being read: what has no other explanation is then damage to it. An error of the card or of
    the machine is no BaseError: nothing that a user chose or that lies on the disk is at fault.
    """
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except BaseError:
        raise
    except (
        UnpicklingError
    ) as error:  # transformers loads *.bin with weights_only=True, which runs no code
        cure = "take a model saved as safetensors"
        raise BaseError(
            f"model.id = {model.id}: its pickled weights hold more than tensors, or are damaged: "
            f"{cure}"
        ) from error
    except (
        OSError,
        ValueError,
        ImportError,
        LookupError,
        TypeError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in OF_THE_SYSTEM or (number is not None and copy is None):
            raise  # a full disk is no fault of the config
        if reason := of_the_machine(error):
            if reason in str(error) or not str(error):
                raise
            raise _of_the_card(model, reason) from error
        raise BaseError(_explained(model, error, copy)) from error


def _of_the_card(model: ModelConfig, reason: str) -> RuntimeError:
    """An error that transformers has put aside, as what it is."""
    import torch

    lacking = lacks_memory(RuntimeError(reason))
    kind = torch.OutOfMemoryError if lacking else RuntimeError
    return kind(f"while model.id = {model.id} was loaded: {reason}")


def _explained(model: ModelConfig, error: Exception, copy: Path | None) -> str:
    text = str(error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    if "trust_remote_code" in text:
        return (
            f"model.id = {model.id} brings Python code of its own, which would run here: if you "
            "trust it, set model.trust_remote_code=true"
        )
    if re.search(r"flash.?att", text, re.IGNORECASE):
        return (
            f"model.attention = {model.attention} cannot run here ({reason}): install flash-attn "
            "or set model.attention=sdpa"
        )
    if "scaled_dot_product_attention" in text:
        return without_sdpa(model)
    if "gated" in text:
        return _gated(model.id)
    if copy is not None:
        return damaged_copy(model, copy, reason)
    if (
        "AutoModelForCausalLM" in text
        or "model_type" in text
        or "recognize this architecture" in text
    ):
        return (
            f"model.id = {model.id}: this transformers knows no causal language model of its kind "
            f"({reason}): "
            "update transformers or take another model"
        )
    return (
        f"model.id = {model.id} cannot be loaded ({reason}): check model.id, model.revision and "
        "the files"
    )


def without_sdpa(model: ModelConfig) -> str:
    """Message about a model whose attention has no kernel of torch's."""
    return (
        f"model.attention = {model.attention} is not there for model.id = {model.id}: set "
        "model.attention=eager"
    )


def damaged_copy(model: ModelConfig, copy: Path, reason: str) -> str:
    """Message about a quantised copy that is not as it was made."""
    return (
        f"the quantised copy of model.id = {model.id} is damaged ({reason}): delete the folder "
        f"{copy}; the next launch makes it again"
    )
