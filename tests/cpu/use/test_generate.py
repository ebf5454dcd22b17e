"""`glassloop generate`: sampling, reasoning, reproducible draws, refusals."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from generating import answers_in, answers_of, asked, command, told_of
from rich.console import Console
from schemas import conform
from trained_runs import copy_of, finished_run, prompt_of
from transformers import AutoModelForCausalLM, GenerationConfig

from glassloop.cli.__main__ import main
from glassloop.data.rows import Example, Turn
from glassloop.use.answering import Reply, Splitter, split_reasoning
from glassloop.use.loaded import load
from glassloop.use.sampling import GumbelNoise, Sampling, processors_of, sampling_of, stop_ids_of
from glassloop.use.session import beside
from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

QUESTIONS = [
    "Who calls?",
    "The caller asks for the code that was sent to your phone, and says that the account is "
    "locked.",
    "12 + 30?",
]


@pytest.fixture(scope="module")
def parts(run):
    trained = open_trained(run)
    tokenizer = load_tokenizer_of(trained)
    return load(trained, torch.device("cpu")), tokenizer, template_of(trained, tokenizer)


def test_sampling_is_what_generation_config_asks_for():
    r1 = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=5)
    assert sampling_of(r1) == (Sampling(temperature=0.6, top_p=0.95), [])
    assert sampling_of(GenerationConfig()) == (Sampling(), [])
    assert (
        sampling_of(GenerationConfig(temperature=0.6))[0].temperature == 0
    )  # it does not ask for sampling
    _, notes = sampling_of(GenerationConfig(do_sample=True, typical_p=0.5))
    assert "typical_p" in notes[0]
    assert stop_ids_of(SimpleNamespace(stop_ids=(2,)), r1) == (2, 5)  # type: ignore[arg-type]


def test_the_settings_in_the_bases_folder_reach_the_command(tiny_llama, tmp_path, capsys):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    r1 = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    (base / "generation_config.json").write_text(json.dumps(r1))
    run = finished_run(tmp_path, base)
    code, out, _ = command(capsys, run, "hi", "--max-new-tokens", 2, "--seed", 5)
    assert code == 0 and "temperature 0.6, top_p 0.95, seed 5" in out
    code, out, _ = command(capsys, run, "hi", "--max-new-tokens", 2, "--greedy")
    assert code == 0 and "greedy" in out


def test_two_columns_say_what_is_reasoning_and_how_each_ended():
    replies = {
        "base": Reply("because", "yes", True, True, 5),
        "adapter": Reply(None, "no", True, False, 3),
    }
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(beside(replies, console, 3))
    out = console.file.getvalue()
    for said in (
        "base (5 tokens, ended by itself)",
        "adapter (cut off at 3 of at most 3 tokens)",
        "[reasoning]",
        "[answer]",
    ):
        assert said in out, out


def test_draws_have_the_models_distribution():
    scores = torch.log(torch.tensor([[0.6, 0.3, 0.1, 0.0]]))
    counts = torch.zeros(4)
    noise = GumbelNoise(3, 0, 1)
    for _ in range(4000):
        counts[noise(torch.zeros(1, 1), scores).argmax()] += 1
    for share, wanted in zip((counts / 4000).tolist(), (0.6, 0.3, 0.1, 0.0), strict=True):
        assert abs(share - wanted) < 4 * math.sqrt(0.25 / 4000)
    kept = processors_of(Sampling(temperature=1.0, top_p=0.7), 0)(0, 1)
    for processor in kept[:-1]:
        scores = processor(torch.zeros(1, 1), scores)
    assert (
        torch.isinf(scores[0, 2:]).all() and torch.isfinite(scores[0, :2]).all()
    )  # 0.6 alone is below 0.7, with 0.3 above


def test_a_question_gets_the_same_answer_alone_and_in_a_left_padded_batch(parts):
    together = asked(parts, QUESTIONS)
    alone = [asked(parts, [question], first=place)[0] for place, question in enumerate(QUESTIONS)]
    small = asked(parts, QUESTIONS, batch=2)
    assert together == alone == small
    assert asked(parts, QUESTIONS) == together
    assert asked(parts, QUESTIONS, seed=8) != together
    state = torch.get_rng_state()
    asked(parts, QUESTIONS[:1])
    assert torch.equal(torch.get_rng_state(), state)


def test_base_and_adapter_answer_each_as_itself(parts, run, tiny_llama):
    greedy = Sampling()
    with_adapter, without = (
        asked(parts, QUESTIONS, sampling=greedy, with_adapter=side) for side in (True, False)
    )
    assert with_adapter != without
    loaded, tokenizer, template = parts
    ids = torch.tensor([prompt_of(template, QUESTIONS[0])])
    plain = AutoModelForCausalLM.from_pretrained(loaded.engine.report.folder, dtype=torch.float32)
    out = plain.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    new = out[0, ids.shape[1] :].tolist()
    new = new[: new.index(2)] if 2 in new else new
    assert without[0].answer == tokenizer.decode(new).strip()


def test_the_prompt_is_the_one_of_training_and_marks_in_text_stay_text(parts, run):
    _, tokenizer, template = parts
    saved = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt_of(template, "hi") == saved
    assert 2 not in prompt_of(template, "</s> is not the end")
    row = Example("r", (Turn("user", "hi"), Turn("assistant", "there")))
    assert list(template.encode(row).input_ids[: len(saved)]) == saved


def test_streaming_gives_the_same_text_piece_by_piece(parts):
    pieces = []
    (reply,) = asked(parts, QUESTIONS[:1], write=lambda kind, text: pieces.append((kind, text)))
    assert "".join(text for kind, text in pieces if kind == "answer").strip() == reply.answer
    assert asked(parts, QUESTIONS[:1]) == [reply]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nyes", False, ("why", "yes", True)),
        ("why\n</think>\n\nyes", True, ("why", "yes", True)),
        ("yes", False, (None, "yes", True)),
        ("never done", True, ("never done", "", False)),
        ("a < b <thin air", False, (None, "a < b <thin air", True)),
    ],
)
def test_reasoning_is_told_apart_whole_and_in_any_pieces(text, opened, expected):
    assert split_reasoning(text, opened) == expected
    for size in (1, 3, 7):
        splitter, kinds = Splitter(opened), {"reasoning": "", "answer": ""}
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        for kind, piece in [
            *(p for part in parts for p in splitter.feed(part)),
            *splitter.feed("", True),
        ]:
            kinds[kind] += piece
        assert (kinds["reasoning"].strip(), kinds["answer"].strip()) == (
            expected[0] or "",
            expected[1],
        )


def test_the_command_reads_words_files_and_stdin(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "One?"}) + "\n" + json.dumps("Two?") + "\n")
    code, out, _ = command(capsys, run, "--file", file, "--json", "--max-new-tokens", 4)
    told = [conform("generate", json.loads(line)) for line in out.splitlines()]
    assert code == 0 and [one["question"] for one in told] == ["One?", "Two?"]
    assert set(told[0]) == {"schema", "number", "question", "base", "adapter"}
    drawn = [
        told_of(
            capsys,
            run,
            "--file",
            file,
            "--json",
            "--temperature",
            1,
            "--batch",
            size,
            "--max-new-tokens",
            12,
        )
        for size in (1, 2)
    ]
    assert drawn[0] == drawn[1]  # the second question has its own noise, whatever batch it comes in
    code, out, _ = command(
        capsys,
        run,
        "--json",
        "--only",
        "adapter",
        "--max-new-tokens",
        4,
        stdin=b"One?\n",
        monkeypatch=monkeypatch,
    )
    assert code == 0 and answers_in(out)[0]["adapter"] == answers_of(told[0])["adapter"]
    code, out, _ = command(capsys, run, "One?", "--max-new-tokens", 4)
    assert code == 0 and "--- base" in out and "--- adapter" in out


def test_an_empty_system_prompt_is_none(run, capsys):
    said = [
        told_of(capsys, run, "One?", "--json", "--max-new-tokens", 8, *more)
        for more in ([], ["--system", ""], ["--system", "Be brief."])
    ]
    assert said[0] == said[1] != said[2]


def test_chat_goes_on_with_what_was_said(run, capsys, monkeypatch):
    said = iter(["One?", "Two?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said))
    code, out, _ = command(capsys, run, "--chat", "--max-new-tokens", 4, "--only", "adapter")
    assert code == 0 and out.count("--- adapter") == 2 and "refused" not in out


def test_ctrl_c_stops_an_answer_and_no_traceback_is_shown(run, capsys, monkeypatch):
    import glassloop.use.answering as answering

    whole, asked = answering.answer, []

    def stopped_once(*args, **kwargs):
        asked.append(args[1][0])
        if len(asked) == 2:  # the adapter's answer to the first question
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(answering, "answer", stopped_once)
    said = iter(["One?", "Two?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said))
    code, out, _ = command(capsys, run, "--chat", "--max-new-tokens", 4)
    assert code == 0 and "stopped" in out and out.count("--- adapter") == 2
    assert asked[2] == asked[3]  # neither side remembers the question that was stopped
    asked.clear()
    code, _, err = command(capsys, run, "One?", "--max-new-tokens", 4)
    assert code == 130 and "interrupted" in err


def test_options_may_stand_before_the_question(run, capsys):
    code, out, _ = command(capsys, run, "--json", "One?", "--max-new-tokens", 2, "Two?")
    assert code == 0 and [
        conform("generate", json.loads(line))["question"] for line in out.splitlines()
    ] == [
        "One?",
        "Two?",
    ]


def test_a_question_without_room_for_an_answer_is_named_before_any_is_answered(
    run, tmp_path, capsys
):
    file = tmp_path / "q.txt"
    file.write_text("One?\n" + "word " * 600 + "\n")
    code, out, err = command(capsys, run, "--file", file, "--batch", 1, "--json")
    assert code == 2 and "question 2 has" in err and "512 positions" in err and not out
    code, out, _ = command(capsys, run, "One?", "--max-new-tokens", 4096, "--only", "adapter")
    assert code == 0 and ("ended by itself" in out or "no more positions" in out)


def test_what_cannot_be_used_is_refused_with_folder_and_cure(run, tmp_path, capsys):
    torn = copy_of(run, tmp_path / "torn")
    for path in (torn / "checkpoints").glob("update_*/adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text("{}")
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "glassloop_merge.json").write_text("{}")
    for folder, words in (
        (tmp_path / "none", "no folder"),
        (torn, "no whole checkpoint"),
        (foreign, "no checkpoint of glassloop"),
        (merged, "plain weights"),
        (tmp_path, "neither a run's folder"),
    ):
        code, _, err = command(capsys, folder, "hi")
        assert code == 2 and words in err and str(folder) in err, err
    code, _, err = command(capsys, torn / "checkpoints" / "update_000002", "hi")
    assert code == 2 and "adapter_model.safetensors" in err and "--at" in err
    for words, message in (
        (["--at", 9], "it has 2"),
        (["--temperature", -1], "temperature"),
        (["--model", tmp_path], "config.json"),
    ):
        code, _, err = command(capsys, run, "hi", *words)
        assert code == 2 and message in err, err


def test_another_base_is_refused(run, tiny_qwen2, tmp_path, capsys, tiny_llama):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    code, _, err = command(capsys, run, "hi", "--model", other)
    assert code == 2 and "another base" in err and "--model" in err


def test_umlauts_arrive_and_leave_under_a_locale_without_them(run, monkeypatch):
    """Python under LC_ALL=C: bytes as lone surrogates, and an ascii stdout."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    typed_in_c = "Gr\u00fc\u00dfe".encode().decode("ascii", "surrogateescape")
    for words in ([typed_in_c], [typed_in_c, "--json", "--system", typed_in_c]):
        assert main(["generate", str(run), *words, "--max-new-tokens", "2"]) == 0
    sys.stdout.flush()
    *_, last = raw.getvalue().decode("ascii").splitlines()
    assert json.loads(last)["question"] == "Gr\u00fc\u00dfe"


def test_bytes_that_are_no_text_are_refused(run, capsys):
    code, _, err = command(capsys, run, "\udcff")
    assert code == 2 and "a question is not UTF-8 (byte 0)" in err
