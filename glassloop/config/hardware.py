"""Settings for a set of cards.

They say how an update is computed, never what it is.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

BF16 = {  # card, as --hardware names it -> whether it has bf16 units
    "t4": False,
    "v100-32": False,
    "3060": True,
    "3090": True,
    "3090ti": True,
    "4070": True,
    "4080": True,
    "4090": True,
    "5060ti": True,
    "5070ti": True,
    "5080": True,
    "5090": True,
    "a10g": True,
    "l4": True,
    "l40s": True,
    "a6000": True,
    "a100-40": True,
    "a100-80": True,
    "h100-pcie": True,
    "h100": True,
    "h200": True,
}
ALIASES = {"a100": "a100-80", "v100": "v100-32", "rtx6000": "a6000"}
EXAMPLES = ("3090", "2x3090", "2x4090", "2xa100", "t4", "cpu")


def hardware_values(name: str) -> dict[str, Any]:
    """Config values for `cpu`, a card (`3090`) or several (`2x3090`).

    With `packed` passes and memory.profile=fill, a run on the fast engine measures what is free
    and chooses the size of its passes and the layers it keeps. Cards without bf16 units train in
    fp16 on the reference engine. Rows of an update stay as they are.

    Raises:
        ValueError: for a name that is not known, with the nearest one.
    """
    if name == "cpu":
        return {"execution": {"precision": "fp32", "checkpointing": False}}
    count, card = _split(name)
    values: dict[str, Any] = {"execution": {"precision": "bf16", "checkpointing": True}}
    if BF16[card]:
        values["execution"] |= {"layout": "packed", "pass_tokens": None}
        values["memory"] = {"profile": "fill"}
    else:
        values["execution"]["precision"] = "fp16"
    if count is not None:
        values["batch"] = {"ranks": count}
    return values


def _split(name: str) -> tuple[int | None, str]:
    """Number of cards (None: not said) and the card's key in BF16."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", name.strip().lower().replace(" ", ""))
    card = found.group(2) if found else name
    card = ALIASES.get(card, card)
    if found is None or card not in BF16:
        prefix = f"{found.group(1)}x" if found and found.group(1) else ""
        near = difflib.get_close_matches(card, [*BF16, *ALIASES], n=1, cutoff=0.4)
        hint = f" Did you mean {prefix}{near[0]}?" if near else ""
        raise ValueError(
            f"--hardware = {name} is not known.{hint} Cards: {', '.join(BF16)}, each with a "
            "number before it for several (2x3090); or cpu"
        )
    return int(found.group(1)) if found.group(1) else None, card
