"""The engine `unsloth` on two ranks, with a stand-in for the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import HERE, launch, write_rows
from stand_in import write_stand_in


@pytest.mark.parametrize("spoiled", [None, "1"])
def test_two_ranks_train_alike_or_the_run_is_refused(
    tiny_llama: Path, tmp_path: Path, spoiled: str | None
) -> None:
    site = write_stand_in(tmp_path / "site")
    words = [
        str(tmp_path),
        str(tiny_llama),
        str(write_rows(tmp_path / "rows.jsonl", 24)),
        str(site),
    ]
    extra = {} if spoiled is None else {"SPOILED_RANK": spoiled}
    said = launch(
        HERE / "unsloth_ranks.py",
        *words,
        expect=0 if spoiled is None else 1,
        timeout_s=120,
        **extra,
    )
    if spoiled is None:
        assert said.count("two updates alike") == 2
    else:
        assert (
            "is not the one that execution.engine = peft trains on "
            "(lm_head.weight has other values)" in said
        )
