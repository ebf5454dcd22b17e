"""data.template=auto: which template a tokenizer gets, and how a run and its folder name it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import yaml

from glassloop.config import DataConfig
from glassloop.data.rows import Example, Turn
from glassloop.data.templates import R1_MARKS, make_template
from glassloop.saved.resuming import read_plan

ASKED = Example("train:0", (Turn("user", "How many legs?"), Turn("assistant", "Eight.")))


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ("none", "chat", "the tokenizer's own"),
        ("no chat template", "instruct", "no chat template"),
        ("R1's marks", "r1", "DeepSeek-R1's marks"),
    ],
)
def test_a_tokenizer_decides(change: str, name: str, why: str, tiny_tokenizer) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    if change == "no chat template":
        tokenizer.chat_template = None
    if change == "R1's marks":
        tokenizer.add_tokens(list(R1_MARKS))
    template = make_template(DataConfig(), tokenizer, (ASKED,))
    assert template.name == name
    assert why in template.why
    named = make_template(DataConfig(template=name), tokenizer, (ASKED,))  # type: ignore[arg-type]
    assert (named.encode(ASKED), named.why) == (template.encode(ASKED), "")


def test_a_run_records_the_template_and_the_warmup_that_it_took(run_of) -> None:
    run = run_of(
        data={"template": "auto"},
        schedule={"updates": None, "warmup_updates": None, "epochs": 9},
    )
    (line,) = [line for line in run.header if "template" in line]
    assert "chat (auto: the tokenizer's own)" in line
    recorded = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert recorded["data"]["template"] == "chat"
    assert recorded["schedule"]["warmup_updates"] == 3  # 9 epochs of 5 updates, a twentieth
    assert read_plan(run.folder)["warmup"] == 3
    run.close()
