"""A misspelt option of a command is refused with the one that it means."""

from __future__ import annotations

import pytest

from glassloop.cli.__main__ import main
from glassloop.config.arguments import SHORTHANDS, parse
from glassloop.config.options import OF_A_RUN, nearest_option

MISSPELT = {
    "bench --layout literal": "--layouts",
    "cache --remov bases": "--remove",
    "compare A B --no_pages": "--no-page",
    "data --shw 3": "--show",
    "doctor --jsn": "--json",
    "evaluate RUN --row 3": "--rows",
    "generate RUN question --max-tokens 5": "--max-new-tokens",
    "merge RUN OUT --bse dequantised": "--base",
    "plan --with_data": "--with-data",
    "plan --hardwar 3090": "--hardware",
    "push RUN a/b --dryrun OUT": "--dry-run",
    "replay RUN --upate 3": "--update",
    "report RUN --no_text": "--no-text",
    "study FILE --paralel 2": "--parallel",
    "train rows.csv --modle x": "--model",
    "train rows.csv --model x --epoch 3": "--epochs",
    "train rows.csv --model x --hardwar 3090": "--hardware",
    "verify --onl x": "--only",
    "watch RUN --onec": "--once",
}


@pytest.mark.parametrize("line", MISSPELT)
def test_a_misspelt_option_is_refused_with_the_nearest_one(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert (
        f"is not an option of glassloop {line.split()[0]}: did you mean {MISSPELT[line]}?" in said
    )


@pytest.mark.parametrize(
    "word",
    ["--ranks", "--optimizer.lr", "--learning_rate", "--seed", "--config=a.yaml", "--zzz", "-r"],
)
def test_options_fields_and_what_resembles_nothing_are_left_alone(word: str) -> None:
    assert nearest_option(word, ["--ranks", "--config_file", "--reads", "--lr"]) is None


def test_what_a_run_takes_beside_fields_is_no_misspelt_option() -> None:
    assert set(SHORTHANDS) < set(OF_A_RUN)
    with pytest.raises(
        ValueError, match=r"^--confg is not an option of test: did you mean --config\?"
    ):
        parse(["--confg", "a.yaml"], prog="test")
