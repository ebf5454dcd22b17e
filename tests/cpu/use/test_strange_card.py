"""A stranger's strings do nothing in a model card but stand there."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from trained_runs import copy_of, signed_anew, write_config

from glassloop.cli.__main__ import main
from glassloop.use.card.escape import words

PLANT = (
    'x"); evil("\n# Buy\n\n<script>alert(1)</script> [here](https://e.vil) www.e.vil | b\n```\n'
    "![](https://e.vil/p.png) \u202ereversed @all _a_ `"
)
LINE = "".join(char for char in PLANT if char not in "\n\u202e")  # a config refuses those
CODE = {"AutoTokenizer": ["evil/repo--strange.Strange", None]}
HEADINGS = [
    "my-model", "Use", "Training data", "Recipe", "Step math", "Curves", "Evaluation",
    "Hardware and time", "Licences", "What was not measured",
]  # fmt: skip


def change(path: Path, **fields: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **fields}))
    if (path.parent / "SHA256SUMS").exists():
        signed_anew(path.parent)


def files(folder: Path, pattern: str) -> list[Path]:
    found = list(folder.glob(pattern))
    assert found, pattern
    return found


def pushed(folder: Path, to: Path, *words: str) -> int:
    return main(["push", str(folder), "me/my-model", "--dry-run", str(to), *words])


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of(run, tmp_path_factory.mktemp("card") / "run")
    assert main(["evaluate", str(folder), "--max-new-tokens", "2"]) == 0
    return folder


@pytest.fixture
def planted(evaluated: Path, tmp_path: Path) -> Path:
    folder = copy_of(evaluated, tmp_path / "planted")
    write_config(folder, "data", split=LINE, revision=LINE, source="owner/name")
    write_config(folder, "lora", targets=[LINE, "q_proj"])
    write_config(folder, "", preset=LINE)
    change(
        folder / "env.json",
        gpus=[{"name": PLANT}],
        packages={PLANT: PLANT},
        python=PLANT,
        glassloop=PLANT,
    )
    for path in files(folder, "checkpoints/update_*/adapter_config.json"):
        change(path, base_model_name_or_path=PLANT, auto_mapping=CODE, strange=PLANT)
    for path in files(folder, "checkpoints/update_*/tokenizer_config.json"):
        change(path, auto_map=CODE)
    for path in files(folder, "evaluated/*.json"):
        scores = json.loads(path.read_text())["scores"]
        change(path, scores=[{**scores[0], "name": PLANT}, *scores[1:]])
    return folder


def test_planted_strings_are_shown_and_do_nothing(planted, tmp_path):
    assert pushed(planted, tmp_path / "out", "--licence", PLANT) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("evil") >= 10 and "\u202e" not in text
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings == HEADINGS
    assert not [t for t in (*tokens, *inline) if t.type.startswith("html")]
    places = [t.attrs.get("href") or t.attrs.get("src") for t in inline if t.attrs]
    assert places == ["https://huggingface.co/datasets/owner/name", "curves.svg"]
    assert "www." not in "".join(t.content for t in inline if t.type == "text")
    blocks = [t for t in tokens if t.type == "fence"]
    assert [t.info for t in blocks] == ["python", "", ""]
    calls = [n.func for n in ast.walk(ast.parse(blocks[0].content)) if isinstance(n, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "evil"]
    rows = [t for t in tokens if t.type == "tr_open"]
    cells = [t for t in tokens if t.type in ("td_open", "th_open")]
    assert len(rows) == 9 + 6 and len(cells) == 2 * 9 + 4 * 6  # recipe and evaluation


def test_fields_that_name_code_are_not_published(planted, tmp_path):
    for name in ("trusted", "plain"):
        words = ["--trust-remote-code"] if name == "trusted" else []
        assert pushed(planted, tmp_path / name, *words) == 0
        tokenizer = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        adapter = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert ("auto_map" in tokenizer) == (name == "trusted")
        assert not {"auto_mapping", "strange"} & adapter.keys() and adapter["r"] == 4


@pytest.mark.parametrize(
    ("pattern", "fields", "said"),
    [
        ("checkpoints/update_*/adapter_config.json", {"revision": PLANT}, "is no commit, tag"),
        ("evaluated/*.json", {"rows": PLANT}, "evaluated/update_000002"),
        ("evaluated/*.json", {"scores": [{"name": "f1"}]}, "scores.0.values"),
        ("evaluated/*.json", {"counts": {"base": {"no_verdict": PLANT}}}, "counts.base.no_verdict"),
        ("plan.json", {"tail": PLANT}, "plan.json is no plan"),
        ("plan.json", {"rows": PLANT}, "plan.json: rows ="),
    ],
)
def test_what_is_no_name_or_number_is_refused(
    pattern: str, fields: dict[str, Any], said: str, evaluated: Path, tmp_path: Path, capsys
):
    folder = copy_of(evaluated, tmp_path / "planted")
    for path in files(folder, pattern):
        change(path, **fields)
    if "revision" in fields:
        for path in files(folder, pattern):
            change(path, base_model_name_or_path="owner/name")
    assert pushed(folder, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert said in told and 'evil("\n' not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("q_proj", "q_proj"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("2.11.0+cu128", "2.11.0+cu128"),
        ("_a_", "`_a_`"),
        ("see www.e.vil", "`see www.e.vil`"),
        ("a`b|c\n", "`a\\u0060b\\u007cc\\u000a`"),
        ("", "(empty)"),
        ("é", "`é`"),
    ],
)
def test_words(text: str, shown: str):
    assert words(text) == shown


def test_a_long_string_is_cut():
    assert len(words("a" * 10_000_000)) < 300
