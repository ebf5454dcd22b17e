"""Importing the loop searches for no garbage, in a process that begins with it."""

from __future__ import annotations

import sys

import launching
import pytest

FOUND = "print(before, gc.get_stats()[2]['collections'], gc.isenabled(), gc.get_freeze_count())"


def found(code: str) -> tuple[int, int, bool, int]:
    """Large searches before and after `code`, and how the search is left."""
    before = "import gc; before = gc.get_stats()[2]['collections']; "
    said = launching.run([sys.executable, "-c", f"{before}{code}; {FOUND}"], cold=True).stdout
    first, last, enabled, frozen = said.split()
    return int(first), int(last), enabled == "True", int(frozen)


def test_no_search_while_the_loop_is_imported_and_none_among_it_later():
    before, after, enabled, frozen = found("import train_loop")
    assert after == before
    assert enabled
    assert frozen > 200_000  # its objects, of 330,000 or so


@pytest.mark.thorough
def test_a_process_that_has_torch_already_keeps_its_searches():
    _, _, enabled, frozen = found("import torch, train_loop")
    assert enabled
    assert frozen == 0


@pytest.mark.thorough
def test_a_process_without_searches_stays_without():
    _, _, enabled, frozen = found("gc.disable(); import train_loop")
    assert not enabled
    assert frozen == 0
