"""A chat template that never ends, fills the memory or fails gets a sentence, in bounded time."""

from __future__ import annotations

import copy
import resource
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from glassloop.config import DataConfig
from glassloop.data import bounded as bounds
from glassloop.data.bounded import TemplateError, bounded
from glassloop.data.rows import Example, Turn
from glassloop.data.templates import make_template

EXAMPLE = Example("row", (Turn("user", "who?"), Turn("assistant", "nobody")))
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"


@pytest.fixture
def limits() -> Iterator[None]:
    """The limits of the process, which a template must leave as they were."""
    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    timer = signal.getitimer(signal.ITIMER_REAL)[0]  # pytest-timeout may have set one
    yield
    assert resource.getrlimit(resource.RLIMIT_AS) == memory
    assert signal.getsignal(signal.SIGALRM) == handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer > 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "it has not ended after 0.3 s"),
        ("{{ 'x' * 90000000000 }}", "it needs more than 2 GiB of memory"),
        (
            "{% for i in range(99) %}{{ 'x' * 99999 }}{% endfor %}",
            "9,899,901 characters of its own",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without an end"),
        ("{% include 'x' %}", "it fails: no loader for this environment"),
        ("{{ 1 / 0 }}", "it fails: division by zero"),
        ("{% if", "it fails: unexpected 'end of template'"),
        ("{{ raise_exception('only poems') }}", "it fails: only poems"),
    ],
)
def test_a_template_has_bounds(
    template: str, said: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limits: None
) -> None:
    monkeypatch.setattr(bounds.bounded.__wrapped__, "__defaults__", (0.3, bounds.MEMORY))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    began = time.perf_counter()
    with pytest.raises(ValueError, match="chat template refuses turns user") as refusal:
        make_template(DataConfig(source="x.jsonl", template="chat"), tokenizer, [EXAMPLE])
    assert said in str(refusal.value) and time.perf_counter() - began < 20


def test_a_timer_of_the_caller_stays() -> None:
    before = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with bounded("it"):
            pass
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_what_fails_inside_is_about_the_template() -> None:
    with (
        pytest.raises(TemplateError, match=r"it fails: no reason given \(KeyError\)"),
        bounded("it"),
    ):
        raise KeyError
