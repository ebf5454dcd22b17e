"""An error of the card while a base is loaded is never called a fault of its files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from loaded_bases import copies, load
from transformers.integrations import bitsandbytes as integration

from glassloop.base.card_errors import lacks_memory, lost_card, of_the_machine
from glassloop.base.source import BaseError, loading_errors
from glassloop.config import ModelConfig

MODEL = ModelConfig(id="some/model")
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 917504000 bytes. Error code 12 (Cannot allocate memory)"
)
OF_THE_MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Found no NVIDIA driver on your system"),
    RuntimeError(ALLOCATOR),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.EACCES, "Permission denied"),
]
OF_A_FILE = [
    RuntimeError("Error(s) in loading state_dict for LlamaForCausalLM"),
    OSError(errno.ENOENT, "No such file or directory"),
    ValueError("format 0, this version reads 1"),
    RuntimeError("CUDA Setup failed despite GPU being available"),
]


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize("copy", [None, Path("/cache/copy")])
def test_an_error_of_the_machine_stays_what_it_is(error: Exception, copy: Path | None) -> None:
    with pytest.raises(type(error)) as raised, loading_errors(MODEL, copy):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", OF_A_FILE, ids=lambda error: str(error)[:30])
def test_what_has_no_other_explanation_is_damage(error: Exception) -> None:
    with pytest.raises(BaseError, match="is damaged"), loading_errors(MODEL, Path("/cache/copy")):
        raise error


def test_a_lack_of_memory_that_transformers_puts_aside_is_told_and_deletes_no_copy(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises "some issues during automatic conversion" after the last weight."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(integration.Bnb4bitQuantize, "convert", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"model\.id = .* was loaded: .*2\.00 GiB"):
            load(tiny_llama, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(integration.Bnb4bitDeserialize, "convert", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
            load(tiny_llama, tmp_path)
    assert len(copies(tmp_path)) == 1  # it was made, and is read by the next launch
    _, report = load(tiny_llama, tmp_path)
    assert report.from_cache


def test_another_error_that_transformers_puts_aside_is_still_damage(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tiny_llama, tmp_path)

    def odd(*_: object, **__: object) -> None:
        raise ValueError("absmax has another length")

    monkeypatch.setattr(integration.Bnb4bitDeserialize, "convert", odd)
    with pytest.raises(BaseError, match="is damaged"):
        load(tiny_llama, tmp_path)


def test_a_lack_of_memory_is_told_from_a_lost_card() -> None:
    assert [lacks_memory(error) for error in OF_THE_MACHINE] == [
        *(True, True, False, True, False),
        *(False, False, False, False),
    ]
    assert [lost_card(error) for error in OF_THE_MACHINE] == [
        *(False, False, True, False, False),
        *(False, False, False, False),
    ]
    assert not lacks_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert of_the_machine(RuntimeError("all is well")) == ""
