"""The checksum of a base's bytes."""

from __future__ import annotations

import pytest
import torch

from glassloop.base.checksum import _weighted, base_checksum


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 29])
def test_cpu_and_card_sum_the_same_words_in_any_pieces(count: int) -> None:
    drawn = torch.Generator().manual_seed(count)
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=drawn)
    wanted = sum(word * (2 * place + 1) for place, word in enumerate(words.tolist())) % 2**64
    ways = [(step, on_cpu) for step in (1, 8, 64) for on_cpu in (True, False)]
    assert {_weighted(words, step, on_cpu=on_cpu) for step, on_cpu in ways} == {wanted}


def test_base_checksum_sees_two_words_that_changed_places() -> None:
    module = torch.nn.Linear(64, 1, bias=False)
    clean = base_checksum(module)
    module.weight.data[0, :4] = module.weight.data[0, [2, 3, 0, 1]]
    assert base_checksum(module) != clean


def test_base_checksum_sees_every_byte_of_a_tensor_that_ends_in_part_of_a_word() -> None:
    module = torch.nn.Linear(7, 1, bias=False, dtype=torch.bfloat16)  # 14 bytes
    sums = {base_checksum(module)}
    raw = module.weight.data.view(torch.uint8)
    for place in range(14):
        raw[0, place] ^= 0x80
        sums.add(base_checksum(module))
        raw[0, place] ^= 0x80
    assert len(sums) == 15
