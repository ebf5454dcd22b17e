"""Checks, tables and comparisons of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_lines import judged, line

from glassloop.bench import results, table
from glassloop.cli import bench as bench_command


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        (dict(loss=7.01, norm=0.52), True),
        (dict(loss=7.02), False),
        (dict(norm=0.53), False),
        (dict(loss=float("nan")), False),
        (dict(norm=None), False),
        (dict(precision="fp32"), None),
        (dict(workload="full-v1"), None),
        (dict(rows_per_update=16), None),
        (dict(model="smollm2"), None),
    ],
)
def test_a_row_is_held_to_the_reference_on_the_same_rows(
    changes: dict[str, Any], within: bool | None
) -> None:
    one = line(layout="packed", **changes)
    assert results.checked(one, [line(), one])["within"] is within
    shown = "\n".join(
        table.table(judged(line(speed=111.0), one | {"tokens_per_s": {"real": 98765.0}}))
    )
    assert ("98,765" in shown) is bool(within)
    assert ("CHECK FAILED" in shown) is (within is False)
    assert ("not shown" in shown) is (not within)


def test_fp32_is_held_to_more() -> None:
    reference = line(precision="fp32")
    assert results.checked(line(precision="fp32", layout="packed", loss=7.00005), [reference])[
        "within"
    ]
    assert not results.checked(line(precision="fp32", layout="packed", loss=7.0005), [reference])[
        "within"
    ]


def test_a_row_has_the_joules_of_a_token() -> None:
    """The median of the repeats that know them; none without a counter."""
    frugal = [line(repeat=n) | {"energy": {"tokens_per_joule": 2.0 * n}} for n in (1, 2, 3)]
    silent = line(layout="packed") | {"energy": None}
    head, *rows = table.table(judged(*frugal, silent))[:3]
    column = head.split().index("J/tok")
    assert [row.split()[column] for row in rows] == ["0.250", "-"]


def test_table_is_narrow_and_repeats_are_one_row() -> None:
    lines = judged(
        line(1000.0),
        line(1100.0, repeat=1),
        line(1234567.0, layout="packed", ranks=2),
        {**line(), "failed": "x" * 50},
    )
    shown = table.table(lines)
    assert max(len(row) for row in shown[:3]) <= 100
    assert "1,050" in shown[1] and shown[1].endswith("2")
    assert any(row.startswith("failed: peft, scam-v1") for row in shown)


def test_scaling_is_told_and_doubted_above_100_percent() -> None:
    good = "\n".join(table.table(judged(line(1000.0), line(1900.0, ranks=2))))
    assert "2 ranks reach 95% of 2 x one rank" in good and "ABOVE" not in good
    assert "ABOVE 100 %" in "\n".join(table.table(judged(line(1000.0), line(2100.0, ranks=2))))
    assert "share 1 GPU: a check" in "\n".join(
        table.table(judged(line(1000.0, gpus=1), line(1900.0, ranks=2, gpus=1)))
    )


def test_the_same_arms_are_compared() -> None:
    lines, whole = table.compare(judged(line(1000.0)), judged(line(1250.0)), anyway=False)
    assert whole and "1.250" in lines[1] and "the same" in lines[1]
    lines, whole = table.compare(
        judged(line(1000.0)), judged(line(), line(1500.0, layout="packed"))[1:], anyway=False
    )
    assert whole and "1.500" in lines[1] and "peft literal" in lines[1]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(rows_per_update=16), "rows_per_update: 8 in A, 16 in B"),
        (dict(workload="full-v1"), "workload: scam-v1 in A, full-v1 in B"),
        (dict(precision="fp32"), "precision: bf16 in A, fp32 in B"),
        (dict(checkpointing=False), "checkpointing: True in A, False in B"),
    ],
)
def test_other_work_is_not_compared_unless_asked(changes: dict[str, Any], told: str) -> None:
    a, b = judged(line(1000.0)), judged(line(3000.0, **changes))
    lines, whole = table.compare(a, b, anyway=False)
    assert not whole and told in lines[1] and "3.000" not in "\n".join(lines)
    lines, whole = table.compare(a, b, anyway=True)
    assert (
        not whole and "3.000" in lines[1] and "NOT THE SAME WORK" in lines[2] and told in lines[2]
    )


def test_files_are_read_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, speed in (("a", 1000.0), ("b", 500.0)):
        results.append(tmp_path / name, judged(line(speed))[0])
    assert bench_command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "0.500" in out and "#" * 48 in out and "#" * 24 in out
    (tmp_path / "c").write_text('{"kind": "cell"}\n')
    with pytest.raises(ValueError, match="holds no line of glassloop bench"):
        results.read(tmp_path / "c")
    (tmp_path / "c").write_text(json.dumps(line() | {"schema": 2}))
    with pytest.raises(ValueError, match="has schema 2, this glassloop reads up to 1"):
        results.read(tmp_path / "c")
    (tmp_path / "c").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        results.read(tmp_path / "c")


def test_another_card_commit_or_library_is_another_row() -> None:
    other = line(2000.0)
    other["machine"] = {**other["machine"], "packages": {"torch": "2.13.0"}}
    assert len(results.arms(judged(line(1000.0), other))) == 2
