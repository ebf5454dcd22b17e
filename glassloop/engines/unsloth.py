"""Unsloth's model under our loop.

FastLanguageModel loads the very files that the engine `peft` reads, and its layers compute the
decoder. After the decoder it is the reference's code: our loss gives the sum of each row, which
Unsloth's fused loss does not. Adapters have PEFT's names, first values and fp32, so a checkpoint of
one engine opens in the other. Unsloth is imported in `import_unsloth`, nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors import safe_open
from torch import nn

from glassloop.base.card_errors import of_the_machine
from glassloop.base.checks import check_plain_head
from glassloop.base.checksum import base_checksum
from glassloop.base.quantised import LoadReport, find_base
from glassloop.base.reading import DTYPES, prepare_4bit
from glassloop.base.source import BaseSource
from glassloop.base.still import silence
from glassloop.config import LoraConfig, ModelConfig
from glassloop.disk.cache import cache_root
from glassloop.engines.adapters import check_targets, draw_adapters
from glassloop.engines.unsloth_checks import OTHER_ENGINE, check_unsloth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIGS = ("config.json", "generation_config.json")
SHORTEST = 512  # below this max_seq_length Unsloth takes another way to recompute layers
# Of its rotary tables: it keeps the frequencies on the CPU and moves what it makes of them.
ON_CPU = ("inv_freq", "short_inv_freq", "long_inv_freq")
ENVIRONMENT = {"UNSLOTH_DISABLE_STATISTICS": "1"}  # no report to its maintainers
REFUSED = "execution.engine = unsloth"


def import_unsloth() -> Any:
    """Import Unsloth and return its FastLanguageModel.

    It asks to be imported before transformers and peft and warns otherwise. That would be before
    the config is read, for every engine, so it comes late and the warning is dropped. What it
    changes for a Llama it changes in place, in classes and modules that are looked up when called
    (modeling_llama's forwards, peft's layers, torch.utils.checkpoint). A late import cannot change
    environment variables that transformers reads once, for TensorFlow and Flax. Accelerate's
    process group exists by now. Alone on one GPU, Unsloth would keep Accelerate from making one.
    Its generated code goes to the cache, not into the working folder.

    Raises ValueError with the reason if its import fails.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_root(None) / "unsloth_compiled"))
    try:
        with warnings.catch_warnings(), quiet():
            warnings.filterwarnings("ignore", message=".*[Uu]nsloth should be imported before")
            return importlib.import_module("unsloth").FastLanguageModel
    except (ImportError, NotImplementedError, RuntimeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{REFUSED}: its import fails ({_short(error)}): mend its environment, {OTHER_ENGINE}"
        ) from error


def load_with_unsloth(
    model: ModelConfig,
    lora: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str,
    checkpointing: bool,
    seed: int,
    device: torch.device,
    first: Callable[[], AbstractContextManager[Any]],
    longest_row: int | None,
    source: BaseSource | None = None,
) -> tuple[nn.Module, LoadReport]:
    """Let Unsloth load and patch the base, with fresh adapters.

    It lies on this rank's device. Other arguments are those of build_engine.

    Args:
        tokenizer: the run's own; Unsloth gets a copy to change.
        longest_row: tokens; Unsloth cuts longer inputs. None: as many as the model has positions.

    Raises:
        ValueError: where Unsloth cannot run here or not this model, or where the base it holds
            is not bit for bit the one that peft would have.
    """
    check_unsloth(on_cuda=device.type == "cuda")
    report = find_base(model, precision=precision, device=device, first=first, source=source)
    with first():
        fast = import_unsloth()
    assert report.folder is not None
    with (
        random_numbers_kept(device),
        tempfile.TemporaryDirectory(prefix="glassloop-base-") as temporary,
    ):
        folder = Path(temporary)
        fields = lay_out(folder, Path(report.folder), tokenizer)
        longest = rows_allowed(longest_row, fields)
        recompute: Any = "unsloth" if checkpointing else False
        with explained(model):
            base, own_tokenizer = fast.from_pretrained(
                model_name=str(folder),
                max_seq_length=longest,
                dtype=DTYPES[precision],
                load_in_4bit=True,
                device_map={"": device.index or 0} if device.type == "cuda" else {"": "cpu"},
                use_gradient_checkpointing=recompute,
                use_exact_model_name=True,
                fix_tokenizer=False,
                offload_embedding=False,
                trust_remote_code=model.trust_remote_code,
                random_state=seed,
            )
        put_back_pad_rows(base, Path(report.folder), own_tokenizer, tokenizer)
        notes = check_same_base(base, report, own_tokenizer, tokenizer)
        base.requires_grad_(False)
        notes += filter(None, [silence(base)])
        prepare_4bit(base, DTYPES[precision])
        check_plain_head(base, device, report.name)
        check_targets(base, lora.targets)
        with explained(model):
            hf = fast.get_peft_model(
                base,
                r=lora.r,
                lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                bias="none",
                use_gradient_checkpointing=recompute,
                random_state=seed,
            )
            hf.for_training()  # as its own trainer begins: layers are recomputed or not, as asked
        draw_adapters(hf, seed=seed, base_name=report.name, commit=report.commit)
    return hf, replace(report, notes=(*report.notes, *notes))


def lay_out(folder: Path, weights: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Fill `folder` with links to the base's files and a tokenizer.

    It is a folder of its own, since no name can lead Unsloth to a mirror of it, and since a
    quantised copy has no tokenizer. Returns the fields of config.json.
    """
    tokenizer.save_pretrained(folder)
    for file in weights.iterdir():
        if (
            file.suffix in (".safetensors", ".bin")
            or file.name.endswith(".index.json")
            or file.name in CONFIGS
        ):
            (folder / file.name).symlink_to(file.resolve())
    return json.loads((weights / "config.json").read_text(encoding="utf-8"))


def rows_allowed(longest_row: int | None, fields: dict[str, Any]) -> int:
    """max_seq_length for Unsloth.

    Raises ValueError above the model's own positions: Unsloth would stretch rotary positions and
    say nothing.
    """
    positions = fields.get("max_position_embeddings")
    if longest_row is None:
        return positions or SHORTEST
    if positions is not None and longest_row > positions:
        raise ValueError(
            f"data.max_tokens = {longest_row} is more than the {positions} positions of the "
            "model, and Unsloth would change the model to reach "
            f"them: set data.max_tokens={positions}, {OTHER_ENGINE}"
        )
    return max(longest_row, min(SHORTEST, positions or SHORTEST))


def put_back_pad_rows(
    base: nn.Module, files: Path, *tokenizers: PreTrainedTokenizerBase | None
) -> None:
    """Restore the embedding's rows of pad tokens from the files.

    Unsloth zeroes them, and the base would differ from that of other engines.
    """
    embedding = base.get_input_embeddings().weight  # type: ignore[operator]
    name = next(name for name, parameter in base.named_parameters() if parameter is embedding)
    rows: list[Any] = [getattr(_plain(one), "pad_token_id", None) for one in tokenizers]
    for file in files.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            if name in tensors.keys():  # noqa: SIM118  (not a dict)
                stored = tensors.get_slice(name)
                for row in rows:
                    if row is not None and row < stored.get_shape()[0]:
                        embedding[row] = stored[row].to(embedding)


def _plain(tokenizer: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer within a processor, or itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def check_same_base(
    base: nn.Module,
    report: LoadReport,
    own_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Raise ValueError unless the base is `peft`'s, bit for bit.

    Padding is never a label and no row's place sees it, so a pad token that Unsloth chose for its
    own tokenizer changes nothing; it is put back and said. One that it added has changed the base.
    Returns notes; the run's pad id goes into the base's config.
    """
    checksum = base_checksum(base)
    if checksum != report.checksum:
        raise ValueError(
            f"{REFUSED}: the base it loaded is not the one that execution.engine = peft trains on "
            f"({differing(base, Path(report.folder or ''))}): "
            "an adapter trained on it would fit no other copy; set execution.engine=peft"
        )
    ours = tokenizer.pad_token_id
    theirs = getattr(_plain(own_tokenizer), "pad_token_id", ours)
    for holder in (base.config, getattr(base, "generation_config", None)):
        if holder is not None:
            holder.pad_token_id = ours  # type: ignore[union-attr]
    if theirs == ours:
        return []
    return [
        f"Unsloth would pad with id {theirs}; this run pads with {ours}, as with other engines "
        "(padding is never a label)"
    ]


def differing(base: nn.Module, folder: Path) -> str:
    """Name some tensors of a loaded base that differ from its files."""
    here = base.state_dict()
    odd, seen = [], set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                seen.add(name)
                stored, held = tensors.get_tensor(name), here.get(name)
                if held is None:
                    odd.append(f"{name} is missing")
                elif held.dtype != stored.dtype or held.shape != stored.shape:
                    odd.append(
                        f"{name} is {held.dtype} {tuple(held.shape)}, was {stored.dtype} "
                        f"{tuple(stored.shape)}"
                    )
                elif not torch.equal(
                    *(tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (held, stored))
                ):
                    odd.append(f"{name} has other values")
    odd += [
        f"{name} is not in the files"
        for name in here
        if name not in seen and name != "lm_head.weight"
    ]
    if not odd:
        return "each tensor is equal to its file's: names or order differ"
    return "; ".join(odd[:3]) + (f"; and {len(odd) - 3} more" if len(odd) > 3 else "")


def packed_bounds(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Bounds of a packed pass's rows, as Unsloth's attention takes them.

    They are on the CPU: it copies them itself, without waiting for the device.
    """
    return {"packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}


def train_again(hf: nn.Module) -> None:
    """Undo Unsloth's generation mode.

    If generation began in evaluation mode it leaves behind: no recomputation, and kernels for
    answers.
    """
    base = hf.get_base_model()  # type: ignore[operator]
    if getattr(base, "_flag_for_generation", False):
        hf.for_training()  # type: ignore[operator]


@contextlib.contextmanager
def explained(model: ModelConfig) -> Iterator[None]:
    """Turn Unsloth's errors about a model into a ValueError with a cure.

    Its banners stay hidden. An error of the card or the machine stays what it is.
    """
    try:
        with quiet():
            yield
    except (
        RuntimeError,
        ImportError,
        ValueError,
        TypeError,
        AttributeError,
        OSError,
        AssertionError,
    ) as error:
        if of_the_machine(error):
            raise
        raise ValueError(
            f"{REFUSED} cannot load model.id = {model.id} ({_short(error)}): set "
            "execution.engine=peft"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show what is printed meanwhile only if an error ends the block."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise


@contextlib.contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Keep all generators' states: Unsloth seeds every one."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
