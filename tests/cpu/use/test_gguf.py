"""`merge --gguf`: the converter is a process of its own; what it refuses leaves the merge whole.

The converter and llama.cpp are stand-ins here; tests/dist/test_gguf.py has the real ones.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from glassloop.cli.__main__ import main
from glassloop.use.merge import gguf
from glassloop.use.merge.gguf import VARIABLE, convert, find_converter, last_words

CONVERTER = """
import sys, pathlib
folder, _, out, _, kind = sys.argv[1:]
assert (pathlib.Path(folder) / "config.json").is_file()
if kind == "f16":
    pathlib.Path(out).write_bytes(b"half")
    sys.exit("Model OddForCausalLM is not supported")
pathlib.Path(out).write_bytes(b"GGUF" + kind.encode())
"""


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama.cpp") / "convert_hf_to_gguf.py"
    path.write_text(CONVERTER)
    return path


@pytest.fixture(scope="module")
def merged(run: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    words = ["merge", str(run), str(out), "--no-table", "--gguf", "q8_0"]
    assert main([*words, "--converter", str(converter)]) == 0
    return out


def test_the_file_lies_beside_the_weights_and_the_modelfile_names_it(merged: Path) -> None:
    assert (merged / "model-q8_0.gguf").read_bytes() == b"GGUFq8_0"
    lines = (merged / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./model-q8_0.gguf"
    assert lines[1].startswith("TEMPLATE ") and "FROM ." not in lines[1:]
    assert list(merged.glob(".*")) == []


def test_what_cannot_be_converted_is_named_and_leaves_the_merge_whole(
    merged: Path, converter: Path
) -> None:
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    with pytest.raises(ValueError, match=r"OddForCausalLM is not supported\). The merged weights"):
        convert(merged, "f16", converter)
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before


def test_a_failed_conversion_says_what_to_type(merged: Path, tmp_path: Path) -> None:
    broken = tmp_path / "a folder" / "convert_hf_to_gguf.py"
    broken.parent.mkdir()
    broken.write_text("import no_such_package.vocab", encoding="utf-8")
    with pytest.raises(ValueError, match="pip install no_such_package") as refused:
        convert(merged, "q8_0", broken)
    assert f"python '{broken}' {merged} --outfile {merged}/model-q8_0.gguf" in str(refused.value)


def test_the_converter_is_found_or_refused_with_the_way_to_get_it(
    converter: Path, tmp_path: Path
) -> None:
    assert find_converter(converter, {}) == converter
    assert find_converter(None, {VARIABLE: str(converter.parent)}) == converter
    with pytest.raises(ValueError, match=r"no well-kept package.*pip download --no-deps"):
        find_converter(None, {})
    with pytest.raises(ValueError, match=r"there is no such file\. To get it: pip install"):
        find_converter(tmp_path / "nowhere.py", {})


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--gguf", "q8_0"], "needs llama.cpp's converter"),
        (["--gguf", "q8_0", "--bits", "4"], "converts 16-bit weights"),
        (["--converter", "x.py"], "--converter is for --gguf TYPE"),
    ],
)
def test_words_that_cannot_work_are_refused_before_anything_is_merged(
    run: Path,
    tmp_path: Path,
    words: list[str],
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["merge", str(run), str(tmp_path / "out"), *words]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class SameModel:
    """llama_cpp.Llama over the merged weights themselves, one token off where asked."""

    off = 0

    def __init__(self, model_path: str, **_: Any) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            Path(model_path).parent, dtype="auto"
        )

    def reset(self) -> None:
        pass

    def generate(self, prompt: list[int], **_: Any) -> Any:
        ids = torch.tensor([prompt])
        while True:
            token = int(self.model(ids).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            yield token + SameModel.off


class Params:
    """xllamacpp.CommonParams, as far as it is set."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(path="")
        self.n_ctx = self.n_parallel = 0


class SameServer:
    """xllamacpp.Server, which answers as llama.cpp's own server does."""

    def __init__(self, params: Params) -> None:
        assert params.n_ctx and params.n_parallel
        self.model = SameModel(params.model.path)

    def handle_completions(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert (asked["temperature"], asked["logprobs"]) == (0.0, 1)
        tokens = itertools.islice(self.model.generate(asked["prompt"]), asked["n_predict"])
        content = [{"id": token, "token": "x"} for token in tokens]
        return {"choices": [{"text": "x", "logprobs": {"content": content}}]}


@pytest.mark.parametrize("reader", ["llama_cpp", "xllamacpp"])
@pytest.mark.parametrize(("off", "same"), [(0, 48), (1, 0)])
def test_greedy_tokens_are_compared_with_the_merged_model_s(
    merged: Path, monkeypatch: pytest.MonkeyPatch, reader: str, off: int, same: int
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: name == reader or None)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=SameModel))  # type: ignore[arg-type]
    stand_in = SimpleNamespace(Server=SameServer, CommonParams=Params)
    monkeypatch.setitem(sys.modules, "xllamacpp", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(SameModel, "off", off)
    found = gguf.compared(merged / "model-q8_0.gguf", AutoTokenizer.from_pretrained(merged))
    assert found is not None and (found.same, found.tokens) == (same, 48)
    assert str(found).startswith(f"{same} of 48 greedy tokens are those of the merged weights")


def test_without_a_reader_nothing_is_compared(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _name: None)
    assert gguf.compared(merged / "model-q8_0.gguf", None) is None


def test_last_words_are_short() -> None:
    assert last_words("a\n\n  b \n\n") == "b"
    assert last_words("") == "it said nothing"
    assert len(last_words("x" * 9999)) == 300
