"""Put a real tokenizer beside drawn weights.

    GLASSLOOP_CACHE=DIR python benchmarks/one_gpu_tokenizer.py TOKENIZER random:llama-8b ...

Only in a cache of its own, or other runs would find it there too.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from glassloop.base.random import PREFIX, random_folder
from glassloop.disk.cache import cache_root

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def give(tokenizer: Path, models: list[str]) -> None:
    """Copy the tokenizer's files into each model's folder."""
    for model in models:
        if not model.startswith(PREFIX):
            raise SystemExit(f"{model}: only {PREFIX} models take another tokenizer")
        folder = random_folder(model, cache_root(None))
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)


if __name__ == "__main__":
    give(Path(sys.argv[1]), sys.argv[2:])
