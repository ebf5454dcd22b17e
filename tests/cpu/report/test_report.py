"""The report reads a run, words a summary, and packs numbers."""

from __future__ import annotations

import configparser
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import BROKEN, REDONE, SLOW, SPIKE, update_record, write_run

from glassloop.cli.__main__ import main
from glassloop.record.observers import JsonlObserver
from glassloop.record.reading import read_run, standing
from glassloop.record.records import Event
from glassloop.report import writing
from glassloop.report.page import page
from glassloop.report.payload import payload
from glassloop.report.summary import summarise
from glassloop.report.writing import report_at_the_end

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "planted")


def said(folder: Path, topic: str) -> str:
    return " ".join(one.text for one in summarise(read_run(folder)) if one.topic == topic)


def test_of_an_update_that_was_done_again_only_the_last_counts(planted: Path) -> None:
    run = read_run(planted)
    assert [record["update"] for record in run.updates] == list(range(1, 41))
    assert [(record["update"], record["attempt"]) for record in run.replaced] == [(REDONE, 1)]
    assert {row["attempt"] for row in run.rows if row["update"] == REDONE} == {2}
    assert sum(row["update"] == REDONE for row in run.rows) == 8
    assert {probe["attempt"] for probe in run.probes if probe["update"] == REDONE} == {2}


def test_a_course_that_was_left_does_not_count() -> None:
    records = [dict(update=u, attempt=1) for u in (1, 2, 3, 4, 5)] + [
        dict(update=u, attempt=2) for u in (3, 4)
    ]
    kept, replaced = standing(records)
    assert [(one["update"], one["attempt"]) for one in kept] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert sorted(one["update"] for one in replaced) == [3, 4, 5]


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", updates=3)
    (folder / name).write_text("{]\n" + (folder / name).read_text())
    with pytest.raises(ValueError, match=re.escape(name)):
        read_run(folder)


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert "holds no run" in err and "is no folder" in err


def test_the_summary_tells_faults_from_a_sound_run(planted: Path, tmp_path: Path) -> None:
    assert f"first update {BROKEN}" in said(
        planted, "stable"
    ) and f"first at update {SPIKE}" in said(planted, "stable")
    assert "train:evil" in said(planted, "look")
    assert f"Update {SLOW} took 4.4 s where 2 s were usual" in said(planted, "look")
    sound = write_run(tmp_path / "sound", faults=False)
    assert (
        "no detector spoke" in said(sound, "stable")
        and said(sound, "look") == "Nothing stands out."
    )


def test_the_summary_says_whether_it_learned(tmp_path: Path) -> None:
    assert "It learned: held-out loss fell from 3.6" in said(
        write_run(tmp_path / "a", faults=False), "learned"
    )
    worse = write_run(tmp_path / "b", faults=False)
    lines = [json.loads(line) for line in (worse / "evaluations.jsonl").read_text().splitlines()]

    def rewrite(losses: list[float]) -> None:
        (worse / "evaluations.jsonl").write_text(
            "".join(
                json.dumps(one | {"loss_nats": x}) + "\n"
                for one, x in zip(lines, losses, strict=True)
            )
        )

    rewrite([3.6, 3.0, 2.5, 2.9, 3.2])
    assert "lost some of it" in said(worse, "learned") and "after update 20" in said(
        worse, "learned"
    )
    rewrite([3.6, 3.6, 3.7, 3.8, 3.9])
    assert "did not learn" in said(worse, "learned")
    (worse / "evaluations.jsonl").unlink()
    assert "no proof" in said(worse, "learned")


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [(1.0, 0.25, "no longer end"), (0.1, 0.2, "do not end"), (0.0, 1.0, None), (None, 0.4, "do")],
)
def test_answers_that_do_not_end_are_a_warning(
    before: float | None, now: float, word: str | None, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", faults=False)
    file = folder / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, ended in zip(lines, (before, *[now] * (len(lines) - 1)), strict=True):
        line["scores"] |= {"answers": 8, "ended": ended}
        line["base"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    looked = said(folder, "look")
    assert ("Nothing stands out." in looked) == (word is None)
    if word is not None:
        assert f"{1 - now:.0%} of the adapter's answers {word}" in looked


def test_answers_that_name_a_verdict_are_counted_upwards(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", faults=False)
    file = folder / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, missing in zip(lines, (0.7, *[0.1] * (len(lines) - 1)), strict=True):
        line["scores"] |= {"answers": 30, "no_verdict": missing}
        line["base"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "answers that name a verdict 30% to 90%" in said(folder, "learned")


def test_a_trend_within_scatter_is_no_learning(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    drawn = random.Random(1)
    jsonl = JsonlObserver(folder, "none")
    for update in range(1, 41):
        jsonl.on_update(
            dataclasses.replace(
                update_record(update, 40, drawn=drawn), loss_nats=2 + drawn.gauss(0, 0.1)
            ),
            (),
        )
    jsonl.close()
    assert "did not move beyond its scatter" in said(folder, "learned")


@pytest.mark.parametrize(
    ("end", "word"),
    [
        ("finished", "finished"),
        ("failed", "failed"),
        ("stopped", "stopped on demand"),
        (None, "No end is on record"),
    ],
)
def test_the_summary_says_how_it_ended(tmp_path: Path, end: str | None, word: str) -> None:
    assert word in said(write_run(tmp_path / "run", updates=5, faults=False, end=end), "ended")


def test_a_resumed_run_has_not_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=5, faults=False, end="failed")
    jsonl = JsonlObserver(folder, "none")
    jsonl.on_event(Event(5, "resumed", "goes on"))
    jsonl.close()
    assert read_run(folder).end is None


def test_the_page_holds_a_strict_policy_and_names_no_other_file(planted: Path) -> None:
    html = page(payload(read_run(planted)))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert (
        policy
        and policy[1].startswith("default-src 'none'; script-src 'sha256-")
        and "unsafe" not in policy[1]
    )
    shell = re.sub(r"(?s)<script.*?</script>|<style>.*?</style>", "", html)
    assert not re.search(r"""(src|href)=["'](?!#)|https?:|\son\w+=|style=""", shell), (
        "only its own text"
    )
    assert html.count("<script") == html.count("</script>") == 9


def test_a_shared_page_holds_nothing_of_a_row(planted: Path, tmp_path: Path) -> None:
    assert main(["report", str(planted), "--no-text", "--out", str(tmp_path / "shared.html")]) == 0
    raw = (tmp_path / "shared.html").read_text()
    for secret in (
        "hacked",
        "train:",
        "asks for a code",
        "adapter says",
        "Is it a scam",
        "Secret system",
    ):
        assert secret not in raw, secret
    assert not (planted / "report-no-text.html").exists()


def test_the_curves_become_a_picture(planted: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install 'glassloop[report]'"
    )
    assert (
        main(
            [
                "report",
                str(planted),
                "--out",
                str(tmp_path / "r.html"),
                "--png",
                str(tmp_path / "curves.png"),
            ]
        )
        == 0
    )
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Path:
        raise RuntimeError("planted")

    monkeypatch.setattr(writing, "write_report", broken)
    report_at_the_end(planted)
    err = capsys.readouterr().err
    assert "RuntimeError: planted" in err and f"type: glassloop report {planted}" in err


def test_report_and_comparison_never_import_torch(planted: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from glassloop.cli.__main__ import main\n"
        f"assert main(['report', {str(planted)!r}, '--out', {str(tmp_path / 'r.html')!r}]) == 0\n"
        f"assert main(['compare', {str(planted)!r}, {str(planted)!r}, '--no-page']) == 0\n"
        f"assert main(['watch', {str(planted)!r}, '--once']) == 0\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_asset_of_the_page_is_in_a_wheel() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    patterns = parser["options.package_data"]["glassloop.report"].split()
    package = ROOT / "glassloop" / "report"
    assert {path for pattern in patterns for path in package.glob(pattern)} == set(
        (package / "assets").iterdir()
    )


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "glassloop" / "report" / "assets").glob("*.*s")),
    ids=lambda path: path.name,
)
def test_scripts_and_styles_stay_short_enough_to_read(path: Path) -> None:
    if not path.name.startswith("uplot"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 350
