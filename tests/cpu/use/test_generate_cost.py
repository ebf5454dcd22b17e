"""What an answer's tokens cost, and an answer that is stopped."""

from __future__ import annotations

import io
import json
import os
import re
import signal

import pytest
import torch
from generating import asked, asked_at_cost, command
from schemas import conform

from glassloop.use import answering
from glassloop.use.cost import Cost, Meter, Progress, ctrl_c_asks, step_bytes
from glassloop.use.loaded import load
from glassloop.use.sampling import Sampling
from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

GIB = 2**30


@pytest.fixture(scope="module")
def parts(run):
    trained = open_trained(run)
    tokenizer = load_tokenizer_of(trained)
    return load(trained, torch.device("cpu")), tokenizer, template_of(trained, tokenizer)


def test_a_step_reads_all_weights_but_the_embedding(parts):
    hf = parts[0].hf
    base, both = (step_bytes(hf, with_adapter=with_adapter) for with_adapter in (False, True))
    adapters = [p for name, p in hf.named_parameters() if "lora_" in name]
    assert both - base == sum(p.numel() * p.element_size() for p in adapters) > 0
    states = [p.quant_state for p in hf.parameters() if hasattr(p, "quant_state")]
    scales = [one for s in states for one in (s.absmax, *([s.state2.absmax] if s.nested else []))]
    embedding = hf.get_input_embeddings().weight
    plain = [p for name, p in hf.named_parameters() if "lora_" not in name and p is not embedding]
    assert states and base == sum(t.numel() * t.element_size() for t in [*plain, *scales])


def test_a_tied_head_is_read_whole(engine_of, tiny_qwen2):
    hf = engine_of(tiny_qwen2).hf
    embedding = hf.get_input_embeddings().weight
    assert hf.get_output_embeddings().weight is embedding
    whole = step_bytes(hf, with_adapter=False)
    assert whole > embedding.numel() * embedding.element_size()


def test_layers_without_a_copy_on_the_card_are_read_from_the_host(tiny_llama, tmp_path):
    from contextlib import nullcontext

    from glassloop.base.streamed import load_streamed
    from glassloop.config import ModelConfig
    from glassloop.plan.support import groups_of

    model = ModelConfig(id=str(tiny_llama), quantization="nf4", cache_dir=str(tmp_path))
    _, report, pages = load_streamed(
        model, groups_of, precision="fp32", device=torch.device("cpu"), first=nullcontext
    )
    sizes = [layer.nbytes for layer in pages.file.manifest.layers]
    assert report.host_bytes == 0 and pages.host_bytes == sum(sizes)  # a CPU has no bus
    pages.bring(0)
    assert pages.host_bytes == sum(sizes[1:])


def test_a_meter_tells_the_prompt_from_the_steps():
    now = iter([10.0, 12.0, 12.5, 13.5])
    told = []
    meter = Meter(progress=lambda *one: told.append(one), clock=lambda: next(now))
    for _ in range(4):
        meter.put(torch.zeros(2))
    assert told == [(1, None), (2, 0.5), (3, 0.75)]
    assert meter.cost(2, 7, 5) == Cost(2, 3, 2.0, 0.75, 7, 5)
    one = Cost(1, 1, 0.25, None, 3 * GIB, 0)
    assert one.token_s is None and one.words() == "prompt 250 ms; a token reads 3.00 GiB of weights"
    two = Cost(2, 3, 2.0, 0.75, 3 * GIB, 2 * GIB)
    assert two.token_s == 0.375 and two.words() == (
        "prompt 2 s, then 375 ms a token (750 ms for one of each of 2 questions); a step reads "
        "3.00 GiB of weights, 2.00 of them from the host"
    )


def test_every_answer_says_what_its_batch_cost(run, tmp_path, capsys):
    file = tmp_path / "q.txt"
    file.write_text("One?\nTwo?\nThree?\n")
    words = ("--file", file, "--batch", 2, "--max-new-tokens", 4)
    code, out, err = command(capsys, run, *words, "--json")
    told = [conform("generate", json.loads(line)) for line in out.splitlines()]
    assert code == 0 and [one["adapter"]["cost"]["questions"] for one in told] == [2, 2, 1]
    for one in told:
        base, adapter = (one[side]["cost"] for side in ("base", "adapter"))
        assert adapter["step_bytes"] > base["step_bytes"] > 0 and base["host_bytes"] == 0
        assert one["base"]["tokens"] <= base["steps"] <= 4 and base["prompt_s"] > 0
        assert base["token_s"] == pytest.approx(base["step_s"] / base["questions"])
    assert "left" not in err  # nothing of it took long
    code, out, _ = command(capsys, run, *words)
    assert code == 0 and out.count("GiB of weights") == 4  # two batches, two sides
    code, out, _ = command(capsys, run, "One?", "--max-new-tokens", 4)
    assert code == 0 and out.count("a token reads") == 2


def ctrl_c_at(monkeypatch, step, times=1):
    """Send SIGINT to this process as soon as `step` steps were told of in all.

    transformers may tell of a step when it has begun the next.
    """
    whole, taken = Meter.put, []

    def put(self, value):
        whole(self, value)
        taken.append(self.steps > 0)
        for _ in range(times if sum(taken) == step and taken[-1] else 0):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answering.Meter, "put", put)


def test_ctrl_c_keeps_what_was_answered(run, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    words = ("--only", "adapter", "--max-new-tokens", 40, "--temperature", 1)
    code, out, _ = command(capsys, run, "One?", "Two?", "--batch", 1, "--json", *words)
    whole = [json.loads(line)["adapter"] for line in out.splitlines()]
    first = whole[0]["cost"]["steps"]
    ctrl_c_at(monkeypatch, first + 3)
    code, out, err = command(capsys, run, "One?", "Two?", "3?", "--batch", 1, "--json", *words)
    told = [conform("generate", json.loads(line))["adapter"] for line in out.splitlines()]
    assert code == 130 and "stopped by Ctrl-C: 1 of 3 questions were answered whole" in err
    assert len(told) == 2 and told[0]["answer"] == whole[0]["answer"]
    assert told[1]["stopped"] and told[1]["tokens"] in (3, 4) and not told[0]["stopped"]
    assert whole[1]["answer"].startswith(told[1]["answer"][:2])
    ctrl_c_at(monkeypatch, 2)
    code, out, err = command(capsys, run, "One?", "--max-new-tokens", 40)
    assert code == 130 and re.search("stopped at [23] of at most 40 tokens", out)
    assert "--- adapter" not in out  # the base came first
    assert "0 of 1 questions" in err and signal.getsignal(signal.SIGINT) is before


def test_a_side_that_was_not_begun_is_not_told(run, capsys, monkeypatch):
    ctrl_c_at(monkeypatch, 2)
    words = ("One?", "Two?", "3?", "--batch", 2, "--json", "--max-new-tokens", 40)
    code, out, err = command(capsys, run, *words)
    told = [conform("generate", json.loads(line)) for line in out.splitlines()]
    assert code == 130 and "0 of 3 questions" in err and len(told) == 2
    assert all("adapter" not in one and one["base"]["stopped"] for one in told)


def test_a_cpu_says_before_it_answers_how_long_an_answer_may_get(run, capsys):
    _, out, _ = command(capsys, run, "One?", "--max-new-tokens", 4)
    assert "at most 4 tokens an answer; on a CPU that may take minutes" in out


def test_a_second_ctrl_c_does_not_wait(run, capsys, monkeypatch):
    ctrl_c_at(monkeypatch, 2, times=2)
    code, _, err = command(capsys, run, "One?", "--max-new-tokens", 40)
    assert code == 130 and "interrupted" in err
    with ctrl_c_asks() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_batch_that_is_stopped_keeps_each_answers_part(parts):
    whole = asked(parts, ["One?", "Two?"], sampling=Sampling())
    steps = iter(range(100))
    replies, cost = asked_at_cost(
        parts, ["One?", "Two?"], sampling=Sampling(), cut=lambda: next(steps) >= 4
    )
    assert cost.steps == 5 and max(reply.tokens for reply in replies) == 5
    for part, one in zip(replies, whole, strict=True):
        assert part.stopped == (one.tokens > 5)


def test_progress_tells_the_most_that_is_left_and_how_to_shorten_it():
    now = [0.0]
    out = io.StringIO()
    progress = Progress(out, 1024, clock=lambda: now[0])
    tell = progress.of("base")
    for second in range(1, 41):
        now[0] = float(second)
        tell(second, None if second == 1 else 1.0)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("base: 5 of at most 1,024 tokens, at most 17 min left")
    assert lines[1].startswith("base: 35 of at most 1,024 tokens, at most 16 min left")
    assert "Ctrl-C keeps" in lines[0] and "--max-new-tokens" in lines[0] and len(lines) == 2
    progress.clear()
    assert out.getvalue().splitlines() == lines  # nothing to clear where nobody overwrites

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out, now[0] = Terminal(), 0.0
    progress = Progress(out, 8, clock=lambda: now[0])
    now[0] = 6.0
    progress.of("adapter")(4, 10.0)
    progress.clear()
    assert "at most 40 s left" in out.getvalue() and out.getvalue().endswith("\r\033[K")
    assert "\n" not in out.getvalue()
