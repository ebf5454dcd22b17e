"""YAML of a stranger is bounded, and its values are plain."""

from __future__ import annotations

from pathlib import Path

import pytest

from glassloop.config.arguments import ConfigError, parse
from glassloop.disk.plain_yaml import plain_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
BAD_YAML = {
    "an alias bomb": (BOMB, "aliases stand for more than 100,000 values"),
    "itself": ("a: &a [*a]", "contains itself"),
    "a million brackets": ("[" * 250_000, "nested more than 100 deep"),
    "a chain of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)),
        "nested more than 100 deep",
    ),
    "a Python object": ("a: !!python/object/apply:os.getcwd []", "could not determine a construct"),
    "a date that is none": ("a: 2001-99-01", "month must be in"),
    "a number of 5,000 digits": ("a: " + "9" * 5_000, "4300 digits"),
    "too long": ("a: b\n" * 60_000, "300,000 characters, 262,144 at most"),
}


@pytest.mark.parametrize("text, told", BAD_YAML.values(), ids=BAD_YAML)  # noqa: PT006
def test_a_text_is_bounded_wherever_it_is_read(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plain_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        parse(["--config", str(tmp_path / "a.yaml")])


def test_plain_yaml_is_plain() -> None:
    assert plain_yaml("a: 2001-01-01\n5: [yes, 1.5, null]\nb: &b {c: d}\ne: *b") == {
        "a": "2001-01-01",
        "5": [True, 1.5, None],
        "b": {"c": "d"},
        "e": {"c": "d"},
    }
    assert plain_yaml("") is None
