"""Find secrets in values, and hide them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

HIDDEN = "(hidden)"

# Names whose value is a secret: HF_TOKEN, WANDB_API_KEY, AWS_ACCESS_KEY_ID; not max_tokens.
SECRET_NAME = re.compile(
    r"(^|[_.-])(token|key|apikey|secret|password|passwd|credentials?|webhook)([_-]id)?$",
    re.IGNORECASE,
)
TOKENS = {  # by whom it is given out
    "Hugging Face": r"hf_[A-Za-z0-9]{16,}",
    "OpenAI or Anthropic": r"sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
    "GitHub": r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}",
    "GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "Weights & Biases": r"wandb_v\d_\w{16,}",
    "Slack": r"xox[abposr]-[A-Za-z0-9-]{20,}",
    "Amazon": r"A(?:KIA|SIA)[A-Z0-9]{16}",
    "Google": r"AIza[A-Za-z0-9_-]{35}",
}
SHAPES = {
    who: re.compile(rf"(?<![A-Za-z0-9])(?:{shape})(?![A-Za-z0-9])") for who, shape in TOKENS.items()
}
PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password@ of an address
QUERY = re.compile(
    r"(?<=[?&])((?:access_|api_)?(?:token|key|secret|signature|sig)=)[^&\s]+", re.IGNORECASE
)
HEX40 = re.compile(r"[0-9a-f]{40}")  # an older Weights & Biases key, or a commit
NAMED_HEX40 = re.compile(r"(?i)((?:key|token|secret|wandb|login)\W{1,3})[0-9a-f]{40}(?![0-9a-f])")
NOT_SECRET = re.compile(r"(revision|commit|sha|hash|digest|checksum|id)$", re.IGNORECASE)


def command_line(argv: Sequence[str]) -> list[str]:
    """The command line with secrets hidden.

    Hidden are `--hub_token abc`, `--hub_token=abc`, and what `without_secrets` knows.
    """
    shown: list[str] = []
    hide_next = False
    for word in argv:
        name, sign, _ = word.partition("=")
        secret = bool(SECRET_NAME.search(name.lstrip("-")))
        if hide_next:
            word = HIDDEN
        elif secret and sign:
            word = f"{name}={HIDDEN}"
        shown.append(without_secrets(word))
        hide_next = secret and word.startswith("-") and not sign
    return shown


def without_secrets(value: Any, leave: Collection[str] = ()) -> Any:
    """A copy of plain JSON values in which secrets read "(hidden)".

    Hidden are values under a secret's name, values of environment variables with such a name, and
    whatever looks like an access token or carries a password in an address. Values under the names
    in `leave` stay as they are.
    """
    known = [
        text for name, text in os.environ.items() if SECRET_NAME.search(name) and len(text) >= 8
    ]
    return _hide(value, sorted(known, key=len, reverse=True), leave, "")


def secrets_in(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, kind of secret), never the secret itself."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from secrets_in(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from secrets_in(item, name)
    elif isinstance(value, str):
        yield from ((name, f"a token of {who}") for who, one in SHAPES.items() if one.search(value))
        if _is_wandb_key(value, name) or NAMED_HEX40.search(value):
            yield name, "a key of Weights & Biases"
        if PASSWORD.search(value) or QUERY.search(value):
            yield name, "a password in an address"


def _is_wandb_key(value: str, name: str) -> bool:
    return bool(HEX40.fullmatch(value)) and not NOT_SECRET.search(name)


def _hide(value: Any, known: list[str], leave: Collection[str], name: str) -> Any:
    if isinstance(value, dict):
        return {
            k: v
            if k in leave
            else HIDDEN
            if v is not None and SECRET_NAME.search(str(k))
            else _hide(v, known, leave, str(k))
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hide(item, known, leave, name) for item in value]
    if not isinstance(value, str):
        return value
    if _is_wandb_key(value, name):
        return HIDDEN
    for secret in known:
        value = value.replace(secret, HIDDEN)
    for shape in SHAPES.values():
        value = shape.sub(HIDDEN, value)
    value = NAMED_HEX40.sub(rf"\g<1>{HIDDEN}", value)
    return QUERY.sub(rf"\g<1>{HIDDEN}", PASSWORD.sub(HIDDEN, value))
