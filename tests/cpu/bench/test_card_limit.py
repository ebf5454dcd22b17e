"""A large card that looks smaller, and the run that is limited to it."""

from __future__ import annotations

import card_limit
import limited
import pytest
import torch

GIB = 2**30


def test_a_limited_card_has_no_more_free_and_can_be_limited_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[float] = []
    card = type("Card", (), {"total_memory": 100 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share)
    )
    device, other = torch.device("cuda", 1), torch.device("cuda", 0)
    reserved = {device: 3 * GIB, other: 0}
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.__getitem__)
    monkeypatch.setattr(card_limit, "_GENUINE", lambda _: (90 * GIB, 100 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    assert card_limit.limit_card(11.0, device) == 11 * GIB
    assert torch.cuda.mem_get_info() == (8 * GIB, 11 * GIB)
    card_limit.limit_card(24.0, device)  # larger than before: the genuine card is asked
    assert torch.cuda.mem_get_info(device) == (21 * GIB, 24 * GIB)
    card_limit.limit_card(2.0, device)
    assert torch.cuda.mem_get_info() == (0, 2 * GIB)
    card_limit.limit_card(200.0, device)
    assert torch.cuda.mem_get_info() == (90 * GIB, 200 * GIB)  # no more than there is
    assert shares == [0.11, 0.24, 0.02, 1.0]


def test_limited_takes_its_own_option_and_leaves_the_rest() -> None:
    assert limited.split(["a", "--gib", "11.2", "b=1"]) == (11.2, ["a", "b=1"])
    for words in (["a"], ["--gib"], ["--gib", "x"], ["--gib", "-1"], ["--gib", "nan"]):
        with pytest.raises(SystemExit, match="--gib"):
            limited.split(words)
