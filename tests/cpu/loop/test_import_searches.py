"""Importing the loop searches for no garbage, in a process that begins with it."""

from __future__ import annotations

import sys

import launching

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


# The module that decides it, beside a stand-in for torch: an import of the loop takes seconds.
ALONE = "from glassloop.loop import imports; imports.end_of_imports()"


def test_a_process_that_has_torch_already_keeps_its_searches():
    torch = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')"
    _, _, enabled, frozen = found(f"{torch}; {ALONE}")
    assert enabled
    assert frozen == 0


def test_a_process_without_searches_stays_without():
    _, _, enabled, frozen = found(f"gc.disable(); {ALONE}")
    assert not enabled
    assert frozen == 0


def test_the_module_alone_leaves_out_what_is_imported():
    _, _, enabled, frozen = found(ALONE)
    assert enabled
    assert frozen > 1_000
