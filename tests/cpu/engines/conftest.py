"""Models of another config, and Unsloth as a stand-in package."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from family_models import adapters_of, saved_model
from stand_in import write_stand_in

from glassloop.engines import unsloth_checks as checks


@pytest.fixture
def unsloth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(write_stand_in(tmp_path / "site")))
    monkeypatch.setattr(checks, "problems", lambda **_: [])
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(name, "kept")
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("unsloth", "unsloth_zoo")
    ]:
        monkeypatch.delitem(sys.modules, name)
    import unsloth

    yield unsloth  # type: ignore[misc]
    sys.modules.pop("unsloth", None)
    AcceleratorState._reset_state(True)


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def changed(tiny_llama, tiny_qwen2, tmp_path: Path) -> Callable[..., Path]:
    """A tiny model's folder with other fields in config.json."""

    def make(family: str, **fields: object) -> Path:
        folder = shutil.copytree(
            {"llama": tiny_llama, "qwen2": tiny_qwen2}[family],
            tmp_path / f"{family}-{'-'.join(fields)}",
        )
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | fields))
        return folder

    return make


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, tiny_tokenizer, engine_of):
    """The reference engine of a model of MODELS, with drawn adapters; each is made once."""
    made: dict[str, tuple[Any, Any]] = {}

    def build(name: str) -> tuple[Any, Any]:
        if name not in made:
            folder, lora = saved_model(name, tmp_path_factory.mktemp("family"), tiny_tokenizer)
            engine = engine_of(folder, quantization="nf4", lora=lora)
            made[name] = engine, adapters_of(engine)
        return made[name]

    return build
