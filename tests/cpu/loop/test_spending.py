"""Tiers that all ranks have room for: on the card, and on a host that they share."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from glassloop.config import MemoryConfig
from glassloop.loop import spending
from glassloop.loop.replica import card_name
from glassloop.loop.spending import agreed_tiers, base_bytes_of, host_bytes_of, make_lean
from glassloop.predict.choice import Asked, Room, choose
from glassloop.predict.terms import GIB
from glassloop.predict.tiers import Tiers

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
ASKED = Asked("min", 1000, 1000, 0)


def engine_of(device: str = "cuda", movable: int = GIB, locked: int | None = None):
    pages = SimpleNamespace(
        mapped=object(), ranks=1, file=SimpleNamespace(manifest=SimpleNamespace(nbytes=locked))
    )
    return SimpleNamespace(
        embedding=SimpleNamespace(device=SimpleNamespace(type=device)),
        movable_bytes=movable,
        pages=None if locked is None else pages,
    )


def ranks_say(monkeypatch: pytest.MonkeyPatch, *answers: list) -> None:
    """What gather_objects returns, call by call; `own` stands for this rank's word."""
    left = iter(answers)
    monkeypatch.setattr(
        spending,
        "gather_objects",
        lambda own: [own if one == "own" else one for one in next(left)],
    )


# --- ranks of a card


@pytest.mark.parametrize(("cards", "sharing"), [("AB", 1), ("AA", 2)])
def test_a_card_has_one_name_whatever_its_number_is(monkeypatch, cards, sharing):
    """A launcher may show each rank its own card alone: all of them are cuda:0 then."""
    seen = iter(cards)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=next(seen))
    )
    device, said = torch.device("cuda", 0), []
    monkeypatch.setattr(spending, "gather_objects", lambda own: said.append(own) or [*said])
    spending.ranks_on(device)
    assert spending.ranks_on(device) == sharing


def test_without_a_name_of_its_own_a_card_has_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert card_name(torch.device("cuda", 3)) == "cuda:3"
    assert card_name(torch.device("cpu")) == "cpu"


# --- before the check of the engine


class Lean:
    """An engine whose system locks no memory."""

    name = "fused"

    def send_embedding_away(self) -> None:
        raise ValueError("memory.host_gib: 1.0 GiB of host memory cannot be locked")


def test_a_system_that_locks_nothing_refuses_only_what_was_asked_for():
    make_lean(Lean(), MemoryConfig(profile="min"))
    with pytest.raises(ValueError, match=r"memory\.host_gib"):
        make_lean(Lean(), MemoryConfig(profile="min", host_gib=2.0))
    make_lean(Lean(), MemoryConfig(profile="min", host_gib=0))


# --- the host's share


def test_ranks_of_one_host_share_what_it_has_to_spare(monkeypatch):
    monkeypatch.setattr(spending, "spare_bytes", lambda: 60 * GIB)
    ranks_say(monkeypatch, ["own", "own", "other", "own"], ["own"] * 4)
    assert host_bytes_of(engine_of(movable=2 * GIB), "auto") == 18 * GIB
    # The base's pages are locked once a host; they count as available all the same.
    ranks_say(monkeypatch, ["own", "own"], ["own"] * 2)
    assert host_bytes_of(engine_of(movable=GIB, locked=6 * GIB), "auto") == 26 * GIB


def test_all_ranks_take_what_the_poorest_host_has(monkeypatch):
    monkeypatch.setattr(spending, "spare_bytes", lambda: 60 * GIB)
    ranks_say(monkeypatch, ["own", "other"], ["own", 5])
    assert host_bytes_of(engine_of(), "auto") == 5
    monkeypatch.setattr(spending, "spare_bytes", lambda: 0)
    ranks_say(monkeypatch, ["own"], ["own"])
    assert host_bytes_of(engine_of(), "auto") == 0


def test_a_number_is_taken_as_it_is_and_a_cpu_has_no_host(monkeypatch):
    monkeypatch.setattr(spending, "spare_bytes", pytest.fail)
    assert host_bytes_of(engine_of(), 2.5) == int(2.5 * GIB)
    assert host_bytes_of(engine_of("cpu"), "auto") == 0


def test_a_base_that_is_not_locked_takes_nothing_of_the_host():
    engine = engine_of(locked=6 * GIB)
    assert base_bytes_of(engine) == 6 * GIB
    engine.pages.ranks = 2  # sharded
    assert base_bytes_of(engine) == 0
    engine.pages.ranks, engine.pages.mapped = 1, None
    assert base_bytes_of(engine) == base_bytes_of(engine_of()) == 0


# --- agreement


@pytest.mark.parametrize(
    ("each", "agreed"),
    [
        ((Tiers(3), Tiers(5)), Tiers(3)),
        ((Tiers(16, held=9), Tiers(16, held=4)), Tiers(16, held=4)),
        ((Tiers(5), Tiers(1, "all")), Tiers(1, "all")),  # a rank that need not goes along
        ((Tiers(1, "attention"), Tiers(1, "all")), Tiers(1, "attention")),
        ((Tiers(1, "all", streamed=4), Tiers(1, "inputs")), Tiers(1, "inputs", streamed=4)),
        ((Tiers(1, "all"), Tiers(0, "all", chunk=4096)), Tiers(0, "all", chunk=4096)),
        ((Tiers(0, chunk=8192), Tiers(0, chunk=2048)), Tiers(0, chunk=2048)),
    ],
)
def test_the_ranks_agree_on_what_all_have_room_for(monkeypatch, each, agreed):
    ranks_say(monkeypatch, list(each))
    engine = SimpleNamespace(choose_tiers=lambda asked: each[0])
    assert agreed_tiers(engine, ASKED, None) == agreed


@pytest.mark.parametrize(
    ("before", "now", "taken"),
    [
        ({"kept": 2, "host": False, "held": 0}, Tiers(5), Tiers(2)),
        ({"kept": 1, "host": True, "held": 0}, Tiers(1, "all"), Tiers(1, "all")),
        ({"kept": 1, "host": "inputs", "held": 0}, Tiers(1, "all"), Tiers(1, "inputs")),
        ({"kept": 1, "host": True, "held": 0}, Tiers(1, "inputs"), Tiers(1, "inputs")),
        ({"kept": 5, "host": False, "held": 0}, Tiers(1, "all"), Tiers(1, "all")),
        ({"kept": 2, "host": "nothing", "streamed": 7}, Tiers(2), Tiers(2)),
        ({"kept": 0, "host": "all", "chunk": 4096}, Tiers(1, "all"), Tiers(0, "all", chunk=4096)),
        ({"kept": 1, "host": "all"}, Tiers(0, "all", chunk=4096), Tiers(0, "all", chunk=4096)),
        (
            {"kept": 0, "host": "all", "chunk": 8192},
            Tiers(0, "all", chunk=4096),
            Tiers(0, "all", chunk=4096),
        ),
    ],
)
def test_a_resumed_run_keeps_its_tiers_where_they_fit(monkeypatch, before, now, taken):
    ranks_say(monkeypatch, [now])
    engine = SimpleNamespace(choose_tiers=lambda asked: now)
    assert agreed_tiers(engine, ASKED, before) == taken


# --- a system that does not lock what it has


@pytest.fixture
def run_on_a_host(run_of, monkeypatch):
    """A run whose engine may leave everything on the host; `refused` tiers cannot be locked."""
    run = run_of(execution={"engine": "fused", "precision": "fp32"}, model={"quantization": "nf4"})
    engine, refused = run.replica.plain_engine, set()
    sizes = engine.layers[0].sizes

    def make_room(tiers, tokens):
        if tiers.host in refused:
            raise ValueError(f"memory.host_gib: {tiers.host} cannot be locked")

    def choose_tiers(asked):
        return choose(replace(asked, profile="min"), Room(GIB, 99 * GIB), sizes, 2)

    monkeypatch.setattr(engine, "choose_tiers", choose_tiers)
    monkeypatch.setattr(engine, "make_room", make_room)
    return run, refused


@needs_triton
def test_what_a_system_refuses_to_lock_lowers_the_tier_and_is_said(run_on_a_host, monkeypatch):
    run, refused = run_on_a_host
    refused.update(("all", "attention"))
    monkeypatch.setattr(spending, "host_bytes_of", lambda *_: GIB)
    before = len(run.header)
    spending.spend_memory(run)
    said = [" ".join(line.split()) for line in run.header[before:]]
    assert run.tiers["host"] == "inputs"
    assert said[0].startswith("memory 1 of 2 layers kept, inputs alone of the others on the host")
    assert said[1:] == [
        f"less on the host: memory.host_gib: {tier} cannot be locked"
        for tier in ("all", "attention")
    ]


@needs_triton
def test_a_number_that_the_system_does_not_lock_is_refused(run_on_a_host):
    run, refused = run_on_a_host
    refused.add("all")
    memory = run.config.memory.model_copy(update={"host_gib": 1.0})
    run.config = run.config.model_copy(update={"memory": memory})
    with pytest.raises(ValueError, match=r"memory\.host_gib: all cannot be locked"):
        spending.spend_memory(run)


@pytest.mark.parametrize(
    ("tiers", "tokens", "smaller"),
    [
        (Tiers(1), 9000, 8192),
        (Tiers(1), 8192, 4096),
        (Tiers(1), 2048, 0),
        (Tiers(0, "all", chunk=4096), 90_000, 2048),
        (Tiers(0, "all", chunk=2048), 90_000, 0),
        (Tiers(1, "all"), 90_000, 0),  # its kept layer has no slot on the host
    ],
)
def test_a_lack_of_memory_cuts_smaller_pieces(tiers, tokens, smaller):
    engine = SimpleNamespace(tiers=tiers, host=SimpleNamespace(most_tokens=tokens))
    assert spending.smaller_chunk(engine) == smaller
