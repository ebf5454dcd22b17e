"""Format `scam`: a phone call as a question and an answer.

A row asks SCAM_QUESTION about its dialogue and answers with a verdict line. Between the think tags
stands its own `reasoning` if it brings one; else, with `data.scam_reasoning=cues`, what is typical
of its `type` of call (CUES), or of its class if the type is unknown (OTHER_CUES). The question
holds neither type nor label, so neither leaks into the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from glassloop.data.names import shorten
from glassloop.data.rows import RowFault

SCAM_QUESTION = (
    "Read this phone call and decide whether the caller is trying to cheat the receiver. Think "
    "it over first, and end your answer with the line 'Verdict: scam' or 'Verdict: not a "
    "scam'.\n\nThe call:\n"
)
VERDICTS = {"scam": "Verdict: scam", "honest": "Verdict: not a scam"}
LABELS = {
    "1": "scam",
    "1.0": "scam",
    "true": "scam",
    "scam": "scam",
    "0": "honest",
    "0.0": "honest",
    "false": "honest",
    "honest": "honest",
}

# What is typical of a kind of call, not of the call at hand. It follows from `type` and `label`,
# so it stands in the answer only.
CUES = {
    ("ssn", "scam"): (
        "The caller claims to speak for a government office and says that a social security "
        "number is suspended or misused. Real offices write letters. They do not ask for the "
        "number or for money on the phone, and they do not threaten."
    ),
    ("refund", "scam"): (
        "The caller offers a refund that nobody asked for and wants bank details, a fee or a "
        "look at the computer before it is paid. Money that is truly owed comes back the way "
        "it was paid."
    ),
    ("support", "scam"): (
        "The caller reports a fault that the receiver had not noticed and wants remote access, "
        "a password or a payment to repair it. Real support waits until somebody calls for "
        "help."
    ),
    ("reward", "scam"): (
        "The caller announces a prize or a reward and wants a fee, bank details or personal "
        "data before handing it over. A real prize costs nothing."
    ),
    ("delivery", "honest"): (
        "The caller arranges when and where something is handed over. No secret and no unusual "
        "payment is asked for, and what is said can be checked with the sender."
    ),
    ("insurance", "honest"): (
        "The caller explains an insurance policy or a claim, names the company and answers "
        "questions. The receiver is free to think about it and to call back."
    ),
    ("wrong", "honest"): (
        "The caller has reached somebody else than intended, notices it and ends the call. "
        "Nothing is wanted from the receiver."
    ),
    ("appointment", "honest"): (
        "The caller makes, confirms or moves an appointment. Both sides know what it is about, "
        "and nothing beyond that is asked for."
    ),
    ("telemarketing", "honest"): (
        "The caller openly sells something, says for whom, and accepts a no. That may be "
        "unwelcome, but nobody is deceived."
    ),
}
OTHER_CUES = {
    "scam": (
        "The caller wants money, access or personal data, gives a reason nobody can check, and "
        "presses for a quick answer."
    ),
    "honest": (
        "The caller has an ordinary reason to call, asks for nothing secret and leaves the "
        "receiver time to decide."
    ),
}
CONCLUSIONS = {
    "scam": "This has the marks of a scam.",
    "honest": "This does not have the marks of a scam.",
}
VERDICT_LINE = re.compile(r"^\W*verdict\W*:(.*)$", re.IGNORECASE | re.MULTILINE)
Text = Callable[[Any, str], str]  # (cell, its role) -> its text; raises RowFault for none


def verdict_of(text: str) -> str | None:
    """Return the class that an answer's last verdict line names.

    Only what follows the last `</think>` counts. Case, quotes, asterisks and a full stop do not
    matter. None: no line names a class clearly.
    """
    lines = VERDICT_LINE.findall(text.rpartition("</think>")[2])
    said = " ".join(re.findall(r"[a-z]+", lines[-1].lower())) if lines else ""
    if said in ("scam", "a scam"):
        return "scam"
    return "honest" if said in ("not a scam", "not scam", "no scam", "honest") else None


def label_of(value: Any, where: str) -> str:
    """Class of a call. Raises RowFault for any other label."""
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise RowFault(
            "unknown label",
            f"{where}: label = {shorten(value)}; a call is labelled 1 or scam, 0 or honest",
        )
    return label


def call(
    cells: Mapping[str, Any], label: str, thoughts: str, where: str, text: Text
) -> tuple[str, str, str | None]:
    """Question, answer and reasoning of a call.

    `thoughts`: data.scam_reasoning.
    """
    question = SCAM_QUESTION + text(cells["dialogue"], "dialogue").strip()
    reasoning = None if thoughts == "drop" else cells.get("reasoning")
    if reasoning is not None and not (isinstance(reasoning, str) and not reasoning.strip()):
        reasoning = text(reasoning, "reasoning")
    elif thoughts == "cues":
        kind = cells.get("type")
        known = text(kind, "type").strip().lower() if kind is not None else ""
        reasoning = f"{CUES.get((known, label), OTHER_CUES[label])} {CONCLUSIONS[label]}"
    else:
        reasoning = None
    if "response" not in cells:
        return question, VERDICTS[label], reasoning
    response = text(cells["response"], "response")
    said = verdict_of(response)
    if said != label:
        claim = "names no verdict" if said is None else f"says {said}"
        raise RowFault(
            "response against label",
            f"{where}: the response {claim}, but label = {shorten(cells['label'])} says {label}; "
            "correct one of them (a response ends with a line such as "
            f"'{VERDICTS[label]}'), or drop the column",
        )
    return question, response, reasoning
