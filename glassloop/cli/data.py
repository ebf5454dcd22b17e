"""Rows as the model sees them, and counts of what was read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from glassloop.config import Config
from glassloop.config.options import Options
from glassloop.data.rows import Row

if TYPE_CHECKING:
    from rich.text import Text

WITH_TORCH = "GLASSLOOP_DATA_WITH_TORCH"  # set where leaving it out has failed
LEGEND = (
    "[token] is supervised: the model learns to write it. token| is only read. "
    "«token» is a control token, all else is text."
)


def main(argv: list[str]) -> int:
    """`glassloop data PRESET [--show N] [section.field=VALUE ...]`; returns exit code 0.

    Loads the tokenizer and the rows, no model.
    """
    from glassloop.config.arguments import parse

    own = Options(prog="glassloop data", add_help=False, allow_abbrev=False)
    own.add_argument(
        "--show", type=int, default=3, metavar="N", help="rows printed token by token (default: 3)"
    )
    if {"-h", "--help"} & set(argv):
        own.print_help()
    given, rest = own.parse_known_args(argv)
    config = parse(rest, prog="glassloop data")
    without = not config.model.trust_remote_code and WITH_TORCH not in os.environ and no_torch()
    try:
        return show_data(config, given.show)
    except (ImportError, NameError, AttributeError):
        if not without:
            raise
    # This tokenizer cannot be loaded so, or its model must be made first.
    os.environ[WITH_TORCH] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "glassloop.cli", "data", *argv])


def no_torch() -> bool:
    """Let transformers load a tokenizer without torch.

    Importing torch takes most of a short command's time.

    Only for a process that loads no model. False if torch or transformers is imported already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return False
    import transformers.utils

    for module in (transformers.utils, transformers.utils.import_utils):
        module.is_torch_available = lambda: False  # type: ignore[assignment]
    return True


def show_data(config: Config, show: int) -> int:
    """Print the first `show` training rows and the counts.

    Raises ValueError for data or a tokenizer that cannot be used.
    """
    from functools import cache

    from rich.console import Console

    from glassloop.base.tokenizer import load_tokenizer
    from glassloop.data.dataset import summary
    from glassloop.data.reading import read_dataset

    load = cache(lambda: load_tokenizer(config.model))
    dataset = read_dataset(config, load, texts=show)
    console = Console(soft_wrap=True, highlight=False)
    if show:
        console.print(LEGEND, markup=False)
    shown = zip(dataset.train.rows[:show], dataset.train.examples[:show], strict=True)
    for row, example in shown:
        label = "" if example.label is None else f", {example.label}"
        console.print()
        console.rule(
            f"{row.row_id}: {len(row):,} tokens, {row.supervised_tokens:,} supervised{label}",
            align="left",
        )
        console.print(render(row, load()))
    console.print()
    for line in summary(dataset, config.data):
        console.print(line, markup=False)
    return 0


def render(row: Row, tokenizer: Any) -> Text:
    """Every token of a row, told apart with and without colour."""
    from rich.text import Text

    from glassloop.record.printable import visible

    control = set(tokenizer.get_added_vocab().values())
    text = Text()
    for ids, supervised in _characters(row, tokenizer):
        shown = visible(tokenizer.decode(list(ids)))
        if ids[0] in control:
            shown = f"«{shown}»"
        opening, closing, style = ("[", "]", "bold green") if supervised else ("", "|", "dim")
        text.append(
            opening + shown + closing,
            style="bold magenta" if ids[0] in control and not supervised else style,
        )
        if shown.endswith("⏎"):
            text.append("\n")
    return text


def _characters(row: Row, tokenizer: Any) -> Iterator[tuple[Sequence[int], bool]]:
    """Tokens one by one, those of one character (an emoji) together."""
    start = 0
    for end in range(1, len(row) + 1):
        last = end == len(row) or row.supervised[end] != row.supervised[start]
        if (
            last
            or end - start == 4
            or "\ufffd" not in tokenizer.decode(list(row.input_ids[start:end]))
        ):
            yield row.input_ids[start:end], row.supervised[start]
            start = end
