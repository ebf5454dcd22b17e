"""A config with a secret is refused, and the secret not shown."""

from __future__ import annotations

import pytest

from glassloop.config.arguments import ConfigError, parse

HEX = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {
    "hub token": ("data.source", "hf_" + "aB3" * 11, "a token of Hugging Face"),
    "in an address": ("data.source", "https://me:hunter2secret@x.org/a.csv", "a password"),
    "in a query": ("data.source", "https://x.org/a.csv?token=abcdef", "a password"),
    "OpenAI": ("run.name", "sk-" + "aB3d" * 8, "a token of OpenAI"),
    "GitHub": ("model.id", "ghp_" + "aB3" * 12, "a token of GitHub"),
    "wandb": ("tracking.project", HEX, "a key of Weights & Biases"),
    "wandb, named": ("tracking.project", f"key={HEX}", "a key of Weights & Biases"),
    "in a value of another kind": ("optimizer.lr", "hf_" + "aB3" * 11, "a token of Hugging"),
}


@pytest.mark.parametrize("field, value, told", REFUSED.values(), ids=REFUSED)  # noqa: PT006
def test_a_secret_in_a_config_is_refused_unseen(field: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} holds what looks like {told}.*HF_TOKEN") as e:
        parse([f"{field}={value}"])
    assert value not in str(e.value)


def test_names_that_only_look_alike_are_taken() -> None:
    config = parse([f"model.revision={HEX}", "run.name=risk-sk-learning-rate-sweep-one"])
    assert config.model.revision == HEX
