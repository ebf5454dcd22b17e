"""A rank hears what kind of error another one met, so that all end alike."""

from __future__ import annotations

import pytest

from glassloop.formula import dist


@pytest.mark.parametrize(
    ("met", "told"),
    [
        ([ValueError("a")], ValueError),
        ([PermissionError(13, "a")], OSError),
        ([ValueError("a"), PermissionError(13, "b")], OSError),
        ([KeyError("a"), PermissionError(13, "b")], RuntimeError),
    ],
)
def test_the_others_raise_the_kind_that_a_rank_met(
    monkeypatch: pytest.MonkeyPatch, met: list[Exception], told: type[Exception]
) -> None:
    facts: list[object] = []
    for error in met:
        monkeypatch.setattr(dist, "gather_objects", lambda mine: facts.append(mine) or [mine])
        with pytest.raises(type(error)), dist.all_or_none("reading"):
            raise error
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [*facts, mine])
    match = "reading failed on another rank"
    with pytest.raises(told, match=match) as raised, dist.all_or_none("reading"):
        pass
    assert type(raised.value) is told
