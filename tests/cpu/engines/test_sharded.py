"""Layers spread over ranks: every rank reads the bytes of the file."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import types
from typing import Any

import pytest
import torch

from glassloop.base import sharded
from glassloop.base.streamed import load_streamed
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.adapters import attach_lora
from glassloop.formula.optim import FlatAdapters
from glassloop.plan.support import groups_of
from glassloop.predict.choice import Base
from glassloop.predict.tiers import Tiers

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which has no build here"
)


class Ranks:
    """Gathers between threads that stand for ranks."""

    def __init__(self, count: int):
        self.barrier, self.values = threading.Barrier(count, timeout=60), [None] * count

    def gather_of(self, rank: int):
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return gather


def loaded(folder):
    return load_streamed(
        ModelConfig(id=str(folder)),
        groups_of,
        precision="fp32",
        device=CPU,
        first=contextlib.nullcontext,
    )


def shared(folder, ranks: int):
    """(model, report, pages) of each rank, its layers shared."""
    bases, together, errors = [loaded(folder) for _ in range(ranks)], Ranks(ranks), []

    def one(rank: int) -> None:
        try:
            sharded.share_layers(bases[rank][2], rank, together.gather_of(rank))
        except Exception as error:
            errors.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return bases


@pytest.mark.parametrize("ranks", [2, 3])  # two layers: with three ranks, one keeps none
def test_every_rank_reads_every_layer_and_keeps_its_part(tiny_llama, ranks) -> None:
    bases = shared(tiny_llama, ranks)
    wanted = loaded(tiny_llama)[2]
    for rank, (_, _, pages) in enumerate(bases):
        assert pages.ranks == ranks and sorted(pages.peers) == [0, 1]
        for index in range(2):
            assert torch.equal(pages.blob(index), wanted.blob(index))
            assert pages.blob(index).data_ptr() != wanted.blob(index).data_ptr()
        kept = len(range(rank, 2, ranks))
        assert pages.own == set(range(rank, 2, ranks))
        assert f"each of {ranks} ranks keeps {kept} of 2" in pages.notes[-1]


@needs_triton
def test_a_sharded_base_gives_the_bits_of_one_on_the_host(tiny_llama, monkeypatch) -> None:
    """And a rank's own layer is not copied."""
    from glassloop.engines.fused.engine import FusedEngine
    from glassloop.engines.fused.stream import LayerStream

    genuine, found, copied = LayerStream._copy, [], []

    def copy(self, blob, slot) -> None:
        copied[-1].add(blob.data_ptr())
        genuine(self, blob, slot)

    monkeypatch.setattr(LayerStream, "_copy", copy)
    row = Row("r", tuple(range(5, 25)), tuple(place > 3 for place in range(20)))
    for hf, report, pages in (shared(tiny_llama, 2)[1], loaded(tiny_llama)):
        peft = attach_lora(hf, LoraConfig(r=4), seed=0, base_name="b", commit=None)
        engine, adapters = (
            FusedEngine(peft, report, pages=pages),
            FlatAdapters(peft.named_parameters()),
        )
        adapters.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        engine.use_tiers(Tiers(1, streamed=2))
        copied.append(set())
        for _ in range(2):
            loss, _ = engine(build_pass([row], packed=True, pad_id=0, device=CPU))
            loss.backward()
        found.append(adapters.grad.clone())
        copied[-1] = {index for index in range(2) if pages.blob(index).data_ptr() in copied[-1]}
    assert torch.equal(found[0], found[1]) and found[0].norm() > 0
    assert copied == [{0}, {0, 1}]


class ElsewhereBlob:
    """Stands for 24 bytes on a second card."""

    is_cuda, device, nbytes = True, torch.device("cuda", 1), 24

    def __len__(self) -> int:
        return self.nbytes

    def data_ptr(self) -> int:
        return 4096


def test_what_lies_on_another_card_is_fetched_on_the_stream_of_copies(monkeypatch) -> None:
    from glassloop.engines.fused.stream import LayerStream

    asked: list[tuple[int, ...]] = []
    codes = [0, 700]

    class Driver:
        def cuMemcpyAsync(self, *words: Any) -> int:
            asked.append(tuple(word.value for word in words))
            return codes.pop(0)

    monkeypatch.setattr(sharded, "_driver", Driver)
    streams = {CPU: types.SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    stream: Any = types.SimpleNamespace(slots=[torch.zeros(8), torch.zeros(32, dtype=torch.uint8)])
    LayerStream._copy(stream, ElsewhereBlob(), 1)  # type: ignore[arg-type]
    assert asked == [(stream.slots[1].data_ptr(), 4096, 24, 77)]
    with pytest.raises(RuntimeError, match=r"memory\.base = sharded.*cuda:1.*700: set it to host"):
        LayerStream._copy(stream, ElsewhereBlob(), 1)  # type: ignore[arg-type]


def test_one_rank_or_two_hosts_are_refused_on_all_ranks(tiny_llama, monkeypatch) -> None:
    pages = loaded(tiny_llama)[2]
    with pytest.raises(ValueError, match=r"memory\.base = sharded: it needs two ranks.*host, or"):
        sharded.share_layers(pages, 0, lambda value: [value])
    places = [("a", "cuda", 0), ("b", "cuda", 0)]
    cuda = torch.device("cuda", 0)
    assert "several hosts" in sharded._refused(cuda, places)
    assert "share a card" in sharded._refused(cuda, [("a", "cuda", 0), ("a", "cuda", 0)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "CUDA_VISIBLE_DEVICES" in sharded._refused(cuda, [("a", "cuda", 0), ("a", "cuda", 1)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
    assert "cannot read each other" in sharded._refused(cuda, [("a", "cuda", 0), ("a", "cuda", 1)])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    assert sharded._refused(cuda, [("a", "cuda", 0), ("a", "cuda", 1)]) == ""


@pytest.mark.parametrize(("ranks", "own"), [(2, 40), (3, 27), (8, 10)])
def test_a_card_holds_its_part_and_the_slots(ranks: int, own: int) -> None:
    one = Base("sharded", 100, ranks=ranks)
    assert one.streamed(80) == 80 and one.bytes(80, 80) == (own + 2) * 100
