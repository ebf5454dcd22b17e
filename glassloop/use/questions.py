"""Questions for a trained model: command line, stdin or file."""

from __future__ import annotations

import json
from pathlib import Path

KEYS = ("question", "prompt", "dialogue")  # of a line of a .jsonl file


def questions_of(words: list[str], file: Path | None, stdin: bytes | None) -> list[str]:
    """Collect the questions: one a word, more from `file`, one from `stdin`.

    stdin is read if there is neither word nor file, or for the word `-`. A file that ends in .jsonl
    holds a JSON string or an object with `question`, `prompt` or `dialogue` a line; any other file
    holds a question a line.

    Raises:
        ValueError: there is no question, or a file cannot be read; names it, the line and the cure.
    """
    found = [
        readable(stdin, "stdin").strip()
        if word == "-" and stdin is not None
        else typed(word, "a question")
        for word in words
    ]
    if file is not None:
        found += from_file(file)
    elif not words and stdin is not None and stdin.strip():
        found = [readable(stdin, "stdin").strip()]
    if empty := [place for place, question in enumerate(found, 1) if not question.strip()]:
        raise ValueError(f"question {empty[0]} is empty: write it out, or leave it out")
    if not found:
        raise ValueError(
            'no question: glassloop generate RUN "question", --file FILE, text on stdin, or --chat'
        )
    return found


def from_file(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"--file {path} cannot be read ({error.strerror}): name a file of questions"
        ) from error
    lines = [
        (number, line)
        for number, line in enumerate(readable(data, f"--file {path}").splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"--file {path} holds no question: write one a line")
    if path.suffix.lower() != ".jsonl":
        return [line.strip() for _, line in lines]
    return [_from_json(line, f"--file {path}, line {number}") for number, line in lines]


def _from_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({error}): one JSON string or object a line"
        ) from error
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, str):
        raise ValueError(f"{where} holds no text under {', '.join(KEYS)}")
    return value


def typed(text: str, what: str) -> str:
    """Read a word of the command line as UTF-8 under any locale."""
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    return readable(text.encode("utf-8", "surrogateescape"), what)


def readable(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 (byte {error.start}): write it in UTF-8") from error
