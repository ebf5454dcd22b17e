"""The plan as a contract: plan.json compared with what is counted.

The contract holds rows per update and not rows per micro-batch: how an update's rows are laid out
is execution. An update that is skipped, left out or done again is an event and breaks nothing.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glassloop.plan.steps import StepPlan

SCHEMA = 2  # of plan.json; 1 had the step arithmetic alone
# Facts that a launcher decides and that are read back from it.
FROM_THE_LAUNCHER = (
    "processes",
    "devices",
    "collectives",
    "mixed precision",
    "compiler of the launcher",
)


class ContractBroken(RuntimeError):
    """A difference from the plan; the message has both numbers."""


@dataclass(frozen=True)
class Contract:
    """The numbers that a run must match.

    Tuples have one entry an update.
    """

    step: StepPlan
    rows: tuple[int, ...]  # of each update, over all ranks
    supervised_tokens: tuple[int, ...]
    real_tokens: tuple[int, ...]
    rows_digest: str  # of ids, tokens and labels of all rows
    facts: Mapping[str, Any]  # of the whole run, as planned; FROM_THE_LAUNCHER names some
    pass_tokens: int | None = None  # most of a packed pass, the same after a resume; None: literal
    ends_early: Mapping[str, int] | None = None  # evaluation.patience and .every_updates

    def as_dict(self) -> dict[str, Any]:
        """Plain values for plan.json."""
        counted = {
            "rows": self.rows,
            "supervised_tokens": self.supervised_tokens,
            "real_tokens": self.real_tokens,
        }
        whole = {
            "contract": dict(self.facts),
            "rows_digest": self.rows_digest,
            "pass_tokens": self.pass_tokens,
            "ends_early": self.ends_early and dict(self.ends_early),
        }
        return {
            **self.step.as_dict(),
            "schema": SCHEMA,
            **whole,
            "by_update": {name: list(v) for name, v in counted.items()},
        }

    def check_facts(self, found: Mapping[str, Any]) -> None:
        """Raise ContractBroken, before update 1, for facts not as planned.

        `found` has the same names as `facts`.
        """
        assert found.keys() == self.facts.keys(), found.keys() ^ self.facts.keys()
        broken = [
            f"{name}: planned {self.facts[name]}, found {found[name]}"
            for name in self.facts
            if self.facts[name] != found[name]
        ]
        if broken:
            launched = [
                name for name in FROM_THE_LAUNCHER if self.facts.get(name) != found.get(name)
            ]
            cure = (
                "the launcher's arguments, its environment (ACCELERATE_...) or an Accelerate "
                f"config file set {', '.join(launched)}; glassloop doctor shows them"
                if launched
                else "please report it with the command line and this message"
            )
            raise ContractBroken(
                f"the run is not the one that was planned ({'; '.join(broken)}): {cure}"
            )

    def check_update(
        self, update: int, *, rows: int, supervised_tokens: int, real_tokens: int, lr: float
    ) -> None:
        """Raise ContractBroken unless rows, tokens and lr are the planned ones.

        It comes before anything of the update is applied.
        """
        counted = {
            "rows": rows,
            "supervised tokens": supervised_tokens,
            "real tokens": real_tokens,
            "lr": lr,
        }
        planned = (
            self.rows[update - 1],
            self.supervised_tokens[update - 1],
            self.real_tokens[update - 1],
            self.step.lr[update - 1],
        )
        for (name, found), expected in zip(counted.items(), planned, strict=True):
            if found != expected:
                raise ContractBroken(
                    f"update {update}: planned {expected!r} {name}, counted {found!r}; nothing of "
                    "it was applied. Something between the plan and "
                    "the passes changed them: please report it with plan.json, and resume from "
                    "the last checkpoint"
                )


def has_rows_digest(saved: Mapping[str, Any]) -> bool:
    """True if a run's plan.json names the rows it began with."""
    return saved.get("schema", 0) >= SCHEMA and "rows_digest" in saved


def check_same_rows(saved: Mapping[str, Any], digest: str, where: str) -> None:
    """Raise ValueError if a resumed run would train other rows.

    `saved`: its plan.json.

    Args:
        saved: the run's plan.json.
    """
    if has_rows_digest(saved) and saved["rows_digest"] != digest:
        raise ValueError(
            f"the rows are not those that the run began with ({where} has {saved['rows_digest']}, "
            f"now they are {digest}): data, tokenizer or template changed. Give it the same ones "
            "(data.source=PATH if they moved), or begin a new run with --init_adapter"
        )
