"""The same rows trained by glassloop and by others.

A plain loop, transformers' Trainer, TRL's SFTTrainer.

    python strangers.py FOLDER MODEL NAME ...          NAME: glassloop | plain | transformers | trl

`glassloop` makes the problem and goes first. It writes FOLDER/problem.json (rows as ids and labels,
in the order of its updates) and FOLDER/start.safetensors (adapters under PEFT's names). The others
read both and import nothing of glassloop. Each writes FOLDER/NAME.json (loss and gradient norm of
its updates) and FOLDER/NAME.safetensors (its adapters after the last one).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

ROWS = 39  # at 4 an update: nine full windows and one of 3 rows, in micro-batches of 2 and 1
UPDATES = 10
SIZE, ACCUMULATION = 2, 2
R, ALPHA = 4, 8
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-2, 0.1, 1.0
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNLABELLED, ONE_LABEL = (6, 12, 13), 21  # places in the order; 12 and 13 are a whole micro-batch

Updates = list[dict[str, float]]
Adapters = dict[str, torch.Tensor]


def with_glassloop(folder: Path, model: str) -> tuple[Updates, Adapters]:
    """Make the problem, and train it as train_loop.py would.

    With build_run and update_once.
    """
    from launching import write_rows

    from glassloop.config.arguments import from_values
    from glassloop.data.batches import epoch_order
    from glassloop.loop.build import build_run
    from glassloop.loop.conditions import contract_of
    from train_loop import update_once

    optimizer = {
        "name": "adamw",
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "beta1": BETA1,
        "beta2": BETA2,
        "eps": EPS,
    }
    config = from_values(
        {
            "model": {"id": model, "quantization": "none"},
            "lora": {"r": R, "alpha": ALPHA, "targets": TARGETS},
            "data": {
                "source": str(write_rows(folder / "rows.jsonl", ROWS)),
                "template": "chat",
                "max_tokens": 96,
            },
            "batch": {"size": SIZE, "accumulation": ACCUMULATION},
            "schedule": {"updates": UPDATES, "kind": "constant", "warmup_updates": 0},
            "optimizer": {**optimizer, "max_grad_norm": MAX_GRAD_NORM},
            "execution": {"precision": "fp32", "checkpointing": False},
            "evaluation": {"samples": 0},
            "run": {"dir": str(folder / "runs"), "name": "glassloop"},
        }
    )
    run = build_run(config)
    generator = torch.Generator().manual_seed(11)
    for (
        place
    ) in run.replica.adapters.slices.values():  # B too: where it is 0, the gradient of A is 0
        view = place.of(run.replica.adapters.flat.data)
        view.copy_(torch.randn(view.shape, generator=generator) * 0.05)
    order = epoch_order(ROWS, config.seed, 0)
    rows = list(run.batches.rows)
    for place, labels in [*((place, 0) for place in UNLABELLED), (ONE_LABEL, 1)]:
        row = rows[order[place]]
        rows[order[place]] = replace(
            row, supervised=tuple(t >= len(row) - labels for t in range(len(row)))
        )
    run.batches = replace(run.batches, rows=tuple(rows))
    old = run.contract
    run.contract = contract_of(run.batches, old.rows_digest, old.facts, run.config.evaluation)
    problem = [
        {
            "input_ids": row.input_ids,
            "labels": [
                i if s else -100 for i, s in zip(row.input_ids, row.supervised, strict=True)
            ],
        }
        for row in (rows[index] for index in order)
    ]
    (folder / "problem.json").write_text(json.dumps(problem))
    safetensors.torch.save_file(trained(run.replica.plain_engine.hf), folder / "start.safetensors")

    records = [
        outcome.record
        for u in range(1, UPDATES + 1)
        if (outcome := update_once(run, u)) is not None
    ]
    run.close()
    updates = [
        {"loss": r.loss_nats, "grad_norm": r.grad_norm_pre_clip, "clip": r.clip_coef}
        for r in records
    ]
    return updates, trained(run.replica.plain_engine.hf)


def with_a_plain_loop(folder: Path, model: str) -> tuple[Updates, Adapters]:
    """The formula in ten lines.

    One row a pass, so there is no padding and nothing to average.
    """
    hf, rows = lora_model(folder, model), json.loads((folder / "problem.json").read_text())
    parameters = [p for p in hf.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY
    )
    updates: Updates = []
    for first in range(0, len(rows), SIZE * ACCUMULATION):
        window = rows[first : first + SIZE * ACCUMULATION]
        n = sum(label != -100 for row in window for label in row["labels"][1:])
        loss = torch.zeros(())
        for row in window:
            logits = hf(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]  # (T - 1, V)
            loss_sum = F.cross_entropy(
                logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum"
            )
            (loss_sum / n).backward()
            loss += loss_sum.detach() / n
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
        for p in parameters:
            p.grad *= min(1.0, MAX_GRAD_NORM / norm)
        optimizer.step()
        optimizer.zero_grad()
        updates.append({"loss": loss.item(), "grad_norm": norm})
    return updates, trained(hf)


def with_transformers(folder: Path, model: str) -> tuple[Updates, Adapters]:
    """transformers' Trainer.

    Its collator is the one for rows that bring labels.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    hf, rows = (
        lora_model(folder, model),
        Dataset.from_list(json.loads((folder / "problem.json").read_text())),
    )
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model), padding=True)
    trainer = Trainer(
        model=hf,
        args=TrainingArguments(**trainer_settings(folder)),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    return logged(trainer), trained(hf)


def with_trl(folder: Path, model: str) -> tuple[Updates, Adapters]:
    """TRL's SFTTrainer, on rows that are tokenised already."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    hf, rows = (
        lora_model(folder, model),
        Dataset.from_list(json.loads((folder / "problem.json").read_text())),
    )
    # A max_length would drop rows without labels, and later windows would hold other rows.
    config = SFTConfig(**trainer_settings(folder), max_length=None)
    trainer = SFTTrainer(
        model=hf,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return logged(trainer), trained(hf)


def lora_model(folder: Path, model: str):
    """The fp32 base of transformers, with PEFT's adapters of start.safetensors."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    hf = peft.get_peft_model(base, lora)
    start = safetensors.torch.load_file(folder / "start.safetensors")
    parameters = {name: p for name, p in hf.named_parameters() if p.requires_grad}
    assert start.keys() == parameters.keys()
    for name, p in parameters.items():
        p.data.copy_(start[name])
    return hf


def trainer_settings(folder: Path) -> dict:
    """Arguments of both trainers.

    None that affects the numbers is left to a default, which TRL or a later version may change.
    """
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": BETA1,
        "adam_beta2": BETA2,
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def logged(trainer) -> Updates:
    """A Trainer's log of each update.

    Its state has the numbers unrounded.
    """
    return [
        {"loss": e["loss"], "grad_norm": e["grad_norm"]}
        for e in trainer.state.log_history
        if "loss" in e
    ]


def trained(hf) -> Adapters:
    """Copies of the trainable parameters, by PEFT's names."""
    return {name: p.detach().clone() for name, p in hf.named_parameters() if p.requires_grad}


HANDS = {
    "glassloop": with_glassloop,
    "plain": with_a_plain_loop,
    "transformers": with_transformers,
    "trl": with_trl,
}

if __name__ == "__main__":
    where, model_folder = Path(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:]:
        done, adapters = HANDS[name](where, model_folder)
        (where / f"{name}.json").write_text(json.dumps(done))
        safetensors.torch.save_file(adapters, where / f"{name}.safetensors")
