"""Series of losses and gradient norms from clean runs.

Trained here on a CPU, or read from recorded runs.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glassloop.config.arguments import from_values
from glassloop.health.signals import Signals
from glassloop.loop.build import build_run
from train_loop import update_once

CALLS = Path(__file__).resolve().parents[1] / "data" / "calls.jsonl"
SPECIALS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UPDATES, WARMUP, ROWS = 60, 5, 16


@dataclass(frozen=True)
class Series:
    """One run as the detectors see it."""

    name: str
    signals: tuple[Signals, ...]
    row_losses: tuple[tuple[float, ...], ...]  # each update's rows, summed nats
    rows_per_update: int
    warmup_updates: int


def make_base(folder: Path, pretraining: int) -> None:
    """A Llama of two layers with a tokenizer made from the calls, trained on half of them for
    `pretraining` updates.
    """
    calls = [json.loads(line) for line in CALLS.read_text(encoding="utf-8").splitlines()]
    texts = [f"{call['dialogue']} {call['reasoning']} {call['response']}" for call in calls]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(sizes)
    ids = torch.tensor(
        [token for text in texts[: len(texts) // 2] for token in [*fast.encode(text), 2]]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(pretraining):
        batch = torch.stack(
            [ids[start : start + 128] for start in torch.randint(0, len(ids) - 129, (16,)).tolist()]
        )
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg]
    fast.save_pretrained(folder)


def write_short_rows(path: Path, rows: int) -> None:
    """Ragged pieces of the calls: prompts of 4 to 30 words, completions of 2 to 25."""
    calls = [json.loads(line) for line in CALLS.read_text(encoding="utf-8").splitlines()]
    drawn = random.Random(5)

    def piece(text: str, least: int, most: int) -> str:
        words, length = text.split(), drawn.randint(least, most)
        start = drawn.randint(0, max(0, len(words) - length))
        return " ".join(words[start : start + length])

    lines = []
    for _ in range(rows):
        call = drawn.choice(calls)
        answer = f"{call['reasoning']} {call['response']}"
        lines.append({"prompt": piece(call["dialogue"], 4, 30), "completion": piece(answer, 2, 25)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def clean_runs(folder: Path, seeds: int) -> list[Series]:
    """24 runs a seed: 2 bases x 3 sets of rows x 2 learning rates x 2 layouts."""
    os.environ["GLASSLOOP_CACHE"] = str(folder / "cache")
    bases = {"fresh": 0, "pretrained": 300}
    for name, pretraining in bases.items():
        make_base(folder / name, pretraining)
    write_short_rows(folder / "short.jsonl", 600)
    # rows taken: windows an epoch. 56 long ones: 3.5. 600 short ones: 37.5. 40 of them, which a
    # high lr learns by heart: 2.5.
    sources = {
        "calls": (CALLS, 56),
        "short": (folder / "short.jsonl", 600),
        "few": (folder / "short.jsonl", 40),
    }
    result = []
    for seed in range(seeds):
        for base in bases:
            for source, (file, rows) in sources.items():
                for lr in (2e-4, 1e-2):
                    for layout in ("literal", "packed"):
                        name = f"{base}-{source}-{lr:g}-{layout}-{seed}"
                        result.append(
                            train_one(
                                folder,
                                name,
                                base,
                                file,
                                rows,
                                lr,
                                layout,
                                seed=1000 * seed + len(result),
                            )
                        )
                        print(f"{name}: {len(result)} runs", flush=True)
    return result


def train_one(
    folder: Path, name: str, base: str, file: Path, rows: int, lr: float, layout: str, *, seed: int
) -> Series:
    """A clean run through the real loop."""
    config = from_values(
        {
            "seed": seed,
            "model": {"id": str(folder / base), "quantization": "none"},
            "data": {"source": str(file), "template": "chat", "max_tokens": 1024, "rows": rows},
            "batch": {"size": 2, "accumulation": ROWS // 2},
            "schedule": {"updates": UPDATES, "warmup_updates": WARMUP},
            "optimizer": {"lr": lr},
            "execution": {
                "engine": "peft",
                "precision": "fp32",
                "checkpointing": False,
                "layout": layout,
            },
            "evaluation": {"samples": 0},
            "record": {"capsules": 0, "probe_every_updates": None},
            "run": {"dir": str(folder / "runs"), "name": name},
        }
    )
    run = build_run(config)
    signals, row_losses = [], []
    for u in range(1, UPDATES + 1):
        outcome = update_once(run, u)
        assert outcome is not None and outcome.record.action == "applied", outcome
        signals.append(signals_of(vars(outcome.record)))
        row_losses.append(tuple(row.loss_sum_nats for row in outcome.rows))
    run.close_observers()
    return Series(name, tuple(signals), tuple(row_losses), ROWS, WARMUP)


def signals_of(record: dict) -> Signals:
    """What the detectors get of an update's record."""
    names = ("update", "lr", "rows", "supervised_tokens", "loss_nats")
    return Signals(**{name: record[name] for name in names}, grad_norm=record["grad_norm_pre_clip"])


def read_run(folder: Path) -> Series:
    """A recorded run.

    The last attempt at each update that was applied. Raises ValueError where it holds none.
    """
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    updates: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("action") == "applied":
            updates[record["update"]] = record
    if not updates:
        raise ValueError(f"{folder}: metrics.jsonl holds no applied update")
    rows: dict[tuple[int, int], list[float]] = {}
    if (folder / "rows.jsonl").exists():
        for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault((row["update"], row["attempt"]), []).append(row["loss_sum_nats"])
    records = [updates[update] for update in sorted(updates)]
    losses = tuple(tuple(rows.get((record["update"], record["attempt"]), ())) for record in records)
    whole = min(plan["rows_per_update"], plan["rows"])
    return Series(
        folder.name,
        tuple(map(signals_of, records)),
        losses,
        whole,
        config["schedule"]["warmup_updates"],
    )
