"""Merged weights as one GGUF file, by llama.cpp's own converter.

No package on PyPI that is kept well carries the converter in a wheel; the source distribution of
llama-cpp-python does. So the user names the script, and it runs as a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "GLASSLOOP_LLAMA_CPP"  # folder of llama.cpp's sources
NEW_TOKENS = 16
QUESTIONS = ("Who calls?", "Is this a scam? The caller asks for gift cards.", "What is 12 + 30?")
GET_IT = (
    "pip install sentencepiece && pip download --no-deps --no-binary :all: llama-cpp-python && "
    "tar xzf llama_cpp_python-*.tar.gz, then add "
    f"--converter llama_cpp_python-VERSION/vendor/llama.cpp/{SCRIPT}"
)


@dataclass(frozen=True)
class Compared:
    """Greedy tokens of the file beside those of the merged weights."""

    same: int
    tokens: int
    questions: int

    def __str__(self) -> str:
        return (
            f"{self.same} of {self.tokens} greedy tokens are those of the merged weights, on "
            f"{self.questions} questions"
        )


def find_converter(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """The converter's script: as given, else from the environment.

    Raises ValueError, with the way to get it, if there is none.
    """
    folder = environment.get(VARIABLE)
    path = given if given is not None else Path(folder) / SCRIPT if folder else None
    if path is None:
        raise ValueError(
            f"--gguf needs llama.cpp's converter, which no well-kept package carries in a wheel. "
            f"Its sources do: {GET_IT} (or set {VARIABLE} to the folder that holds it)"
        )
    if not path.is_file():
        raise ValueError(f"--converter {path}: there is no such file. To get it: {GET_IT}")
    return path.absolute()


def convert(folder: Path, kind: str, converter: Path) -> Path:
    """Write OUT/model-KIND.gguf and return its path.

    Raises:
        ValueError: the converter cannot convert these weights; has its own last words. The merged
            weights stay as they are, and no half file is left.
    """
    out = folder / f"model-{kind}.gguf"
    half = folder / f".{out.name}.writing"
    words = [sys.executable, str(converter), str(folder), "--outfile", str(half)]
    packages = [str(converter.parent / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*words, "--outtype", kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, packages))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    try:
        if done.returncode != 0 or not half.is_file():
            alone = ["python", str(converter), str(folder), "--outfile", str(out)]
            raise ValueError(
                f"--gguf {kind}: {converter.name} did not convert {folder} (exit code "
                f"{done.returncode}: {last_words(done.stderr)}). The merged weights are whole"
                f"{_missing_package(done.stderr)}. To convert them alone: "
                f"{shlex.join([*alone, '--outtype', kind])}"
            )
        half.replace(out)
    finally:
        half.unlink(missing_ok=True)
    return out


def last_words(text: str) -> str:
    """The last line of a process's stderr, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _missing_package(text: str) -> str:
    """Say how to install a package that was missing."""
    found = re.search(r"No module named '([\w-]+)", last_words(text))
    return "" if found is None else f". What it lacks: pip install {found[1]}"


def point_modelfile_at(file: Path) -> bool:
    """Let the Modelfile beside a GGUF file name it.

    False without a Modelfile.
    """
    path = file.parent / "Modelfile"
    if not path.is_file():
        return False
    _, *rest = path.read_text(encoding="utf-8").split("\n", 1)
    path.write_text("\n".join([f"FROM ./{file.name}", *rest]), encoding="utf-8")
    return True


def compared(file: Path, tokenizer: Any) -> Compared | None:
    """Compare greedy tokens of the file and the merged weights.

    None if neither llama-cpp-python nor xllamacpp is installed.
    """
    reader = next((name for name in READERS if importlib.util.find_spec(name) is not None), None)
    if reader is None:
        return None
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    theirs = READERS[reader](file, prompts)
    ours = _by_transformers(file.parent, prompts)
    pairs = [pair for a, b in zip(theirs, ours, strict=True) for pair in zip(a, b, strict=False)]
    return Compared(sum(a == b for a, b in pairs), len(pairs), len(prompts))


def _by_llama_cpp(file: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    llama_cpp = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(model_path=str(file), n_ctx=1024, verbose=False)
    found = []
    for prompt in prompts:
        model.reset()
        tokens = model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        found.append([token for token, _ in zip(tokens, range(NEW_TOKENS), strict=False)])
    return found


def _by_xllamacpp(file: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 1024, 1
    server = xllamacpp.Server(params)
    asked = {"n_predict": NEW_TOKENS, "temperature": 0.0, "ignore_eos": False, "logprobs": 1}
    found = []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, "cache_prompt": False, **asked})
        if "choices" not in answer:
            raise ValueError(f"{file}: llama.cpp does not answer ({str(answer)[:200]})")
        tokens = answer["choices"][0]["logprobs"]["content"]
        found.append([token["id"] for token in tokens])
    return found


# Packages that read GGUF files, the first that is there. xllamacpp has wheels; the other is built.
READERS: dict[str, Callable[[Path, Sequence[list[int]]], list[list[int]]]] = {
    "llama_cpp": _by_llama_cpp,
    "xllamacpp": _by_xllamacpp,
}


def _by_transformers(folder: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])  # (1, T)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found
