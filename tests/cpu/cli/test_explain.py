"""explain knows every field; docs/record.md is what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from schemas import conform

from glassloop.cli.__main__ import main
from glassloop.cli.explain import kinds, markdown
from glassloop.config.names import PEER_NAMES, field_names
from glassloop.record.meaning import meanings, unit_of
from glassloop.record.records import UpdateRecord

ROOT = Path(__file__).resolve().parents[3]


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["explain", *words]) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.err


def test_docs_record_md_is_what_the_dataclasses_say() -> None:
    page = (ROOT / "docs/record.md").read_text(encoding="utf-8")
    assert page == markdown() + "\n", "glassloop explain --markdown > docs/record.md"
    for file in kinds():
        assert f"## {file}" in page


def test_every_field_of_every_record_has_a_meaning_and_says_when_it_is_null() -> None:
    for file, kind in kinds().items():
        for field, one in zip(dataclasses.fields(kind), meanings(kind), strict=True):
            assert one.text.endswith("."), f"{file}: {field.name}"
            may_be_null = "None" in str(field.type)
            assert bool(one.none_when) == may_be_null, f"{file}: {field.name}: {one.none_when!r}"


def test_a_file_or_a_section_gives_all_of_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for name in kinds():
        fields = conform("explain", json.loads(said(capsys, name, "--json")))["fields"]
        assert [one["name"] for one in fields] == [one.name for one in meanings(kinds()[name])]
    fields = json.loads(said(capsys, "tracking", "--json"))["fields"]
    names = {one["name"] for one in fields}
    assert names == {name for name in field_names() if name.startswith("tracking.")}


def test_a_field_without_a_docstring_is_seen() -> None:
    @dataclasses.dataclass
    class Bare:
        said: int
        """Something."""
        unsaid: int

    with pytest.raises(ValueError, match=r"Bare\.unsaid has no docstring"):
        meanings(Bare)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("loss_nats", "nats a token"),
        ("loss_sum_nats", "nats"),
        ("update_s", "s"),
        ("rank_peak_gib", "GiB"),
        ("rank_pcie_in_mb_s", "1e6 bytes/s"),
        ("supervised_tokens", "tokens"),
        ("rank_passes", ""),
        ("updates", ""),
    ],
)
def test_a_unit_follows_from_the_name(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_a_record_s_field_says_meaning_unit_ranks_and_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = said(capsys, "rank_grad_norm")
    for part in ("metrics.jsonl", "one a rank", "under ddp", "before reduction"):
        assert part in shown
    (one,) = (one for one in meanings(UpdateRecord) if one.name == "update_s")
    assert (one.layout, one.text[:9]) == ("rank 0", "Wall time")


def test_every_field_of_the_config_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for name in field_names():
        found = conform("explain", json.loads(said(capsys, name, "--json")))["fields"]
        assert found[0]["name"] == name
        assert found[0]["text"] or name == "preset"


def test_other_trainers_names_lead_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "per_device_train_batch_size")
    assert shown.startswith("batch.size") and "micro_batch_size" in shown
    for peer in PEER_NAMES:
        assert said(capsys, peer)


def test_a_wrong_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" in said(capsys, "grad_nor", code=2)
    assert "grad_norm_pre_clip" in said(capsys, "grad_nor", code=2)
    assert "name a field" in said(capsys, code=2)
    assert conform("explain", json.loads(said(capsys, "update", "--json")))["fields"]


def test_a_config_field_says_its_values_and_its_unit_in_plain_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "'auto' | 'gpu' | 'host' | 'sharded' | int | str" in said(capsys, "memory.base")
    assert "unit      s\n" in said(capsys, "execution.collective_timeout_s")
    assert "unit" not in said(capsys, "data.answer_tokens"), "texts have no unit"
    for name in field_names():
        (one,) = json.loads(said(capsys, name, "--json"))["fields"][:1]
        for inner in ("Annotated", "Union", "FieldInfo", "Metadata", "<", "NoneType"):
            assert inner not in one["type"], f"{name}: {one['type']}"
