"""The longest row of a card: it fits, a longer one does not, and the host is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glassloop.config import PROJECTIONS
from glassloop.predict.cards import budget_bytes
from glassloop.predict.ledger import ledger_of
from glassloop.predict.longest import STEP, fits, host_of, longest_row, row_of
from glassloop.predict.shapes import KNOWN
from glassloop.predict.spend import host_bytes_of, with_tiers
from glassloop.predict.terms import GIB, Work, tiers_of

R1 = KNOWN["random:llama-8b"]
WORK = Work(rows=2, tokens=2048, r=16, targets=PROJECTIONS, profile="min")
CARDS = (7.5, 11.5, 15.5, 23.5, 47.0)


@pytest.mark.parametrize("profile", ["min", "fill", 10.0])
@pytest.mark.parametrize("base", ["auto", "gpu", "host"])
@pytest.mark.parametrize("gib", CARDS)
def test_it_fits_and_the_next_length_does_not(gib, base, profile):
    work, budget = replace(WORK, base=base, profile=profile), budget_bytes(gib, 1)
    found = longest_row(R1, work, budget)
    assert found.tokens and found.tokens % STEP == 0
    chosen = with_tiers(R1, row_of(work, found.tokens), budget)
    assert tiers_of(R1, chosen) == found.tiers
    assert ledger_of(R1, chosen, "fused").peak_bytes * 1.03 <= budget
    longer = [found.tokens + STEP, found.tokens * 5 // 4, found.tokens * 2]
    assert not any(fits(R1, row_of(work, tokens), budget) for tokens in longer)


@pytest.mark.parametrize("name", ["random:llama-8b", "random:qwen-32b"])
@pytest.mark.parametrize("profile", ["min", "fill"])
def test_no_card_between_two_others_has_shorter_rows(name, profile):
    """What is chosen may not lie between what fits and what the ledger allows."""
    work, shapes = replace(WORK, base="auto", profile=profile), KNOWN[name]
    cards = [gib / 10 for gib in range(100, 250, 3 if name == "random:llama-8b" else 10)]
    by_card = [longest_row(shapes, work, budget_bytes(gib, 1)).tokens for gib in cards]
    assert by_card == sorted(by_card)


def test_more_of_the_card_and_more_of_the_host_are_longer_rows():
    by_card = [longest_row(R1, WORK, budget_bytes(gib, 1)).tokens for gib in CARDS]
    assert by_card == sorted(by_card) and len(set(by_card)) == len(CARDS)
    hosts = [replace(WORK, host_gib=gib) for gib in (0, 2, 16, 32)]
    by_host = [longest_row(R1, one, budget_bytes(23.5, 1)).tokens for one in hosts]
    assert by_host == sorted(by_host) and by_host[0] == by_host[1] < by_host[2] < by_host[3]


@pytest.mark.parametrize("gib", CARDS[:-1])
def test_the_host_that_it_takes_is_what_there_is(gib):
    work = replace(WORK, host_has_gib=20)
    found = longest_row(R1, work, budget_bytes(gib, 1))
    assert 0 < found.host.total_bytes <= 20 * GIB
    named = {term.what.partition(",")[0]: term.size_bytes for term in found.host.terms}
    assert named["activations"] <= host_bytes_of(R1, work)
    assert named["embedding"] == R1.embedding_weights * 2
    assert ("the base" in named) == (found.tiers.streamed > 0)


def test_a_pass_is_cut_only_where_it_does_not_fit_whole():
    """And in the largest pieces that fit."""
    budget = budget_bytes(23.5, 1)
    found = [
        tiers_of(R1, with_tiers(R1, row_of(replace(WORK, base="gpu"), tokens), budget))
        for tokens in (2048, 8192, 16_384, 32_768, 65_536, 131_072, 196_608)
    ]
    assert [one.chunk for one in found[:4]] == [0] * 4
    assert found[-1].chunk and not found[-1].kept
    cut = [one.chunk > 0 for one in found]
    assert cut == sorted(cut)
    whole = replace(found[-1], kept=1, chunk=0)
    one = row_of(WORK, 196_608)
    assert ledger_of(R1, replace(one, tiers=whole), "fused").peak_bytes > 1.5 * budget


def test_a_long_row_on_a_small_card_leaves_all_on_the_host_while_few_layers_could_be_kept():
    """So attention is not computed again; short rows in a pass as long keep layers instead.

    What is free beside that keeps layers whole, unless as little as possible is asked.
    """
    work, budget = replace(WORK, profile="fill", base="gpu"), budget_bytes(23.5, 1)
    one = row_of(work, 24_576)
    long = tiers_of(R1, with_tiers(R1, one, budget))
    assert (long.kept, long.host) == (6, "all")
    peaks = [
        ledger_of(R1, replace(one, tiers=replace(long, kept=kept)), "fused").peak_bytes
        for kept in (6, 8)
    ]
    assert peaks[0] * 1.03 <= budget < peaks[1] * 1.03
    least = tiers_of(R1, with_tiers(R1, replace(one, profile="min"), budget))
    assert (least.kept, least.host) == (1, "all")
    many = replace(work, rows=12, tokens=2048)
    assert tiers_of(R1, with_tiers(R1, many, budget)).host == "nothing"


def test_a_sharded_base_takes_nothing_of_the_host():
    work = replace(WORK, base="sharded", ranks=2)
    found = longest_row(R1, work, budget_bytes(11.5, 2))
    assert found.tiers.streamed == 32
    assert not any("the base" in term.what for term in found.host.terms)
    assert host_bytes_of(R1, work) > host_bytes_of(R1, replace(WORK, base="host")) + 3 * GIB


def test_a_pass_that_stays_on_the_card_takes_no_host():
    assert host_of(R1, with_tiers(R1, replace(WORK, profile="fill"), 23 * GIB)).terms == ()


def test_a_card_for_which_nothing_is_small_enough_has_no_longest_row():
    assert longest_row(R1, WORK, GIB).tokens == 0
