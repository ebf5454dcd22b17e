"""`glassloop doctor`: checks find their faults, print no secret, explain messages."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from glassloop.cli.doctor import check_data, check_p2p, main, shown
from glassloop.config.arguments import parse
from glassloop.doctor import card_checks, p2p
from glassloop.doctor import checks as doctor
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
from glassloop.doctor.known_errors import KNOWN, explain
from glassloop.doctor.launch_files import check_launcher, default_config_file
from glassloop.predict.hardware import Present

ROOT = Path(__file__).resolve().parents[3]
CARD = Present("NVIDIA GeForce RTX 4090", 23.99, 23.5, "580.65.06", (8, 9))
OLD = Present("Tesla T4", 15.0, 14.5, "580.65.06", (7, 5))


def levels(findings: list[Finding], check: str) -> set[str]:
    return {one.level for one in findings if one.check == check}


def only(findings: list[Finding], level: str) -> Finding:
    (found,) = [one for one in findings if one.level == level]
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without cards, logins or launcher settings."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "HF_", "HUGGING_FACE", "WANDB", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: ())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- versions ---


def versions(**changed: str | None):
    tested = {name: high for name, (_, high) in doctor.TESTED.items()}
    return lambda name: {**tested, **changed}.get(name)


def test_versions_that_were_tested_are_fine_and_others_are_named():
    assert {one.level for one in doctor.check_versions(versions())} == {OK}
    old = only(doctor.check_versions(versions(torch="2.9.1+cu128")), PROBLEM)
    assert (old.check, old.cure) == ("torch", "pip install 'torch>=2.11'")
    missing = only(doctor.check_versions(versions(peft=None)), PROBLEM)
    assert missing.check == "peft" and "not installed" in missing.text
    new = only(doctor.check_versions(versions(transformers="6.0.0")), NOTE)
    assert "newer than the tested 5.17 to 5.23" in new.text
    assert levels(doctor.check_versions(versions(transformers="5.23.4")), "transformers") == {OK}


@pytest.mark.parametrize(
    ("package", "broken", "whole"),
    [
        ("torch", "2.15.0", "2.14.1"),
        ("transformers", "5.23.0", "5.17.0"),
        ("trl", "1.16.0", "1.15.0"),
        ("datasets", "5.0.0", "4.9.9"),
    ],
)
def test_each_of_unsloths_pins_is_checked(package, broken, whole):
    good = {
        "unsloth": "2026.10.9",
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "trl": "1.15.0",
        "datasets": "4.7.0",
    }
    assert doctor.check_pins(lambda name: (good | {package: whole}).get(name))[0].level == OK
    found = doctor.check_pins(lambda name: (good | {package: broken}).get(name))[0]
    assert (
        found.level == PROBLEM
        and f"{package} {broken}" in found.text
        and "environment of its own" in found.cure
    )
    assert doctor.check_pins(lambda _: None)[0].level == OK


def test_torchs_cuda_is_read_from_its_files():
    import torch

    assert doctor.torch_cuda() == torch.version.cuda
    assert doctor.cuda_in("debug = False\ncuda: Optional[str] = '13.0'\nhip = None\n") == "13.0"
    assert doctor.cuda_in("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n") is None


# --- cards ---


def cards(
    words: list[str], present: tuple[Present, ...], cuda: str | None = "13.0", **environ: str
) -> list[Finding]:
    return card_checks.check_cards(parse(words), present, cuda, environ)


def test_a_sound_pair_of_cards_has_no_problem():
    found = cards(["r1_8b_scam", "batch.ranks=2"], (CARD, CARD))
    assert {one.level for one in found} == {OK}
    assert "GPU 1: about" in found[-1].text


def test_a_driver_that_is_too_old_for_torchs_cuda_is_named():
    old = Present(CARD.name, CARD.total_gib, CARD.free_gib, "550.54.15", CARD.capability)
    assert "550.54.15 is older than 580.00" in only(cards(["r1_8b_scam"], (old,)), PROBLEM).text
    assert levels(cards(["r1_8b_scam"], (old,), cuda="12.8"), "driver") == {OK}


def test_a_cpu_build_beside_a_card_is_a_problem_and_without_one_is_not():
    assert "CPU build" in only(cards([], (CARD,), cuda=None), PROBLEM).text
    assert levels(cards([], (), cuda=None), "gpu") == {NOTE}
    assert "nvidia-smi shows none" in cards([], ())[0].text


def test_bf16_on_a_card_without_it_is_a_problem_and_fp16_on_one_with_it_a_note():
    found = only(cards(["r1_8b_scam"], (OLD,)), PROBLEM)
    assert (found.check, found.cure) == ("bf16", "execution.precision=fp16")
    assert levels(cards(["r1_8b_scam", "execution.precision=fp16"], (OLD,)), "bf16") == {OK}
    assert levels(cards(["r1_8b_scam", "execution.precision=fp16"], (CARD,)), "bf16") == {NOTE}
    unknown = Present("NVIDIA Something", 80.0, 80.0, "580.1", None)
    found = cards(["r1_8b_scam"], (unknown,))
    assert levels(found, "bf16") == {NOTE} and levels(found, "memory") == {NOTE}


def test_more_ranks_than_visible_cards_and_hidden_cards_are_named():
    found = only(
        cards(["r1_8b_scam", "batch.ranks=2"], (CARD, CARD), CUDA_VISIBLE_DEVICES="1"), PROBLEM
    )
    assert found.text == "batch.ranks = 2, but 1 GPUs are visible" and "batch.ranks=1" in found.cure
    words = ["r1_8b_scam", "batch.ranks=2", "execution.backend=gloo"]
    assert levels(cards(words, (CARD,)), "ranks") == set()
    mixed = cards(["r1_8b_scam"], (CARD, Present("NVIDIA H200", 140.0, 139.0, "580.1", (9, 0))))
    assert any("different kinds" in one.text for one in mixed)


def test_memory_that_is_taken_already_counts_and_the_cure_keeps_the_rows():
    busy = Present(CARD.name, CARD.total_gib, 8.0, CARD.driver, CARD.capability)
    found = only(cards(["r1_8b_scam", "execution.engine=peft"], (busy,)), PROBLEM)
    assert found.check == "memory" and found.cure == "batch.size=1 batch.rows_per_update=16"


# --- launcher ---


def launch(tmp_path: Path, text: str, words: tuple[str, ...] = ("r1_8b_scam",)) -> list[Finding]:
    file = tmp_path / "launch.yaml"
    file.write_text(text)
    return check_launcher(parse(list(words)), {}, file)[1:]


def test_the_launchers_accumulation_flag_is_always_said_to_have_no_effect():
    found = check_launcher(parse([]), {"HF_HOME": "/nowhere"})
    assert "--gradient_accumulation_steps" in found[0].text and "no effect" in found[0].text
    assert found[1].level == OK


@pytest.mark.parametrize(
    ("text", "level", "part"),
    [
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", PROBLEM, "DEEPSPEED"),
        ("distributed_type: FSDP", PROBLEM, "FSDP"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2", PROBLEM, "starts one process"),
        ("distributed_type: 'NO'\nnum_processes: 2", PROBLEM, "starts one process"),
        ("distributed_type: TPU", PROBLEM, "has not been tried"),
        (
            "distributed_type: MULTI_GPU\nmixed_precision: fp16",
            NOTE,
            "mixed_precision fp16 has no effect",
        ),
        (
            "distributed_type: MULTI_GPU\ngradient_accumulation_steps: 8",
            NOTE,
            "gradient_accumulation_steps has no effect",
        ),
        (
            "deepspeed_config: {gradient_accumulation_steps: 8}",
            NOTE,
            "gradient_accumulation_steps has no effect",
        ),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", PROBLEM, "would compile"),
        ("[1, 2]", PROBLEM, "holds no settings"),
        ("a: [", PROBLEM, "cannot be read"),
    ],
)
def test_what_a_launch_file_does_behind_ones_back_is_named(tmp_path, text, level, part):
    found = only(launch(tmp_path, text), level)
    assert part in found.text


def test_processes_other_than_batch_ranks_are_a_problem(tmp_path):
    words = ("r1_8b_scam", "batch.ranks=4")
    found = only(launch(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 2", words), PROBLEM)
    assert found.cure == "--num_processes 4"


@pytest.mark.parametrize("name", ["single_gpu", "ddp_2gpu", "cpu_2proc"])
def test_glassloops_own_launch_files_are_sound(name):
    found = check_launcher(parse([]), {}, ROOT / "accelerate_configs" / f"{name}.yaml")[1:]
    assert {one.level for one in found} == {OK}


def test_the_default_file_is_found_where_accelerate_puts_it(tmp_path):
    accelerate = pytest.importorskip("accelerate.commands.config.config_args")
    assert Path(accelerate.default_yaml_config_file).name == "default_config.yaml"
    assert Path(accelerate.default_yaml_config_file).parent.name == "accelerate"
    (tmp_path / "accelerate").mkdir()
    file = tmp_path / "accelerate" / "default_config.yaml"
    assert default_config_file({"HF_HOME": str(tmp_path)}) is None
    file.write_text("distributed_type: FSDP")
    assert default_config_file({"HF_HOME": str(tmp_path)}) == file
    found = only(check_launcher(parse([]), {"HF_HOME": str(tmp_path)}), PROBLEM)
    assert "default Accelerate config" in found.text


def test_accelerates_variables_are_looked_at():
    found = check_launcher(
        parse([]),
        {
            "HF_HOME": "/nowhere",
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            "ACCELERATE_USE_FSDP": "true",
        },
    )
    assert [one.cure for one in found if one.level == PROBLEM] == [
        "unset ACCELERATE_DYNAMO_BACKEND",
        "unset ACCELERATE_USE_FSDP",
    ]


# --- disk, logins ---


def test_a_disk_is_full_when_all_that_goes_there_does_not_fit(tmp_path):
    config = parse(["r1_8b_scam", f"model.cache_dir={tmp_path}/cache", f"run.dir={tmp_path}/runs"])
    environ = {"HF_HOME": str(tmp_path / "hf")}
    roomy = doctor.check_disk(config, environ, free=lambda _: 100 << 30)
    assert [one.level for one in roomy] == [OK, OK, OK]
    assert "15.0 GiB" in roomy[2].text  # 8 billion weights of 16 bits
    tight = doctor.check_disk(config, environ, free=lambda _: 17 << 30)  # each alone would fit
    assert [one.level for one in tight] == [OK, OK, PROBLEM]
    assert tight[2].cure == "make room, or move HF_HOME"
    snapshot = tmp_path / "hf/hub/models--deepseek-ai--DeepSeek-R1-Distill-Llama-8B/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001.safetensors").touch()
    assert (
        len(doctor.check_disk(config, environ, free=lambda _: 17 << 30)) == 2
    )  # downloaded already


def test_logins_are_found_and_never_shown(here, monkeypatch):
    config = parse(["r1_8b_scam"])
    found = doctor.check_logins(config, os.environ)
    assert levels(found, "hub login") == {NOTE} and levels(found, "trackers") == {PROBLEM}
    secret = "hf_" + "a1B2" * 8
    (here / "hf").mkdir()
    (here / "hf" / "token").write_text(secret)
    monkeypatch.setenv("WANDB_API_KEY", "key" + secret)
    found = doctor.check_logins(config, os.environ)
    assert {one.level for one in found} == {OK}
    assert secret not in str(found) and "a1B2" not in str(found)


# --- two cards talking ---


def test_an_all_reduce_between_two_processes_is_timed():
    answer = p2p.try_all_reduce("gloo")
    assert answer.outcome == "ok" and 0 < answer.seconds < 30


def test_a_hang_ends_with_the_limit_and_leaves_no_process(monkeypatch, tmp_path):
    stuck = tmp_path / "stuck"
    stuck.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 600\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(p2p.sys, "executable", str(stuck))
    started = time.monotonic()
    assert p2p.try_all_reduce("nccl", limit_s=1.0).outcome == "hang"
    assert time.monotonic() - started < 20
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_fails_says_why():
    answer = p2p.try_all_reduce("no_such_backend", limit_s=60)
    assert answer.outcome == "failed" and answer.seconds < 60
    assert "no_such_backend" in answer.text


def test_when_one_fails_the_other_is_not_waited_for(monkeypatch, tmp_path):
    half = tmp_path / "half"
    half.write_text(
        '#!/bin/sh\nif [ "$3" = 1 ]; then echo no card; exit 3; fi\nexec sleep 20\n'
    )  # -m glassloop.doctor.p2p RANK
    half.chmod(0o755)
    monkeypatch.setattr(p2p.sys, "executable", str(half))
    answer = p2p.try_all_reduce("nccl", limit_s=10)
    assert (answer.outcome, answer.text) == ("failed", "no card")


def test_a_hang_names_the_variable_that_cures_it(monkeypatch):
    tried = []

    def answer(backend="nccl", *, limit_s=30.0, environment=None):
        tried.append(dict(environment or {}))
        return p2p.Answer("ok" if "NCCL_IB_DISABLE" in (environment or {}) else "hang", 1.0)

    monkeypatch.setattr(p2p, "try_all_reduce", answer)
    (found,) = check_p2p(2)
    assert found.level == PROBLEM and "hung for 30 s" in found.text
    assert found.cure.startswith("export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1")
    assert tried == [{}, *p2p.CURES]
    monkeypatch.setattr(p2p, "try_all_reduce", lambda *_, **__: p2p.Answer("hang", 1.0))
    assert "do not help" in check_p2p(2)[0].cure
    monkeypatch.setattr(p2p, "try_all_reduce", lambda *_, **__: p2p.Answer("ok", 0.002))
    assert check_p2p(2)[0].level == OK


def test_one_visible_card_is_not_tried(monkeypatch):
    monkeypatch.setattr(p2p, "try_all_reduce", lambda *_, **__: pytest.fail("started"))
    assert check_p2p(1)[0].level == NOTE
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert check_p2p(4)[0].level == NOTE


# --- data, messages, command ---


def test_columns_are_checked_when_asked_for(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nq,a\n")
    config = parse([f"data.source={file}"])
    assert check_data(config, False)[0].level == NOTE
    assert check_data(config, True)[0].level == OK
    file.write_text("ask,reply\nq,a\n")
    assert check_data(config, True)[0].level == PROBLEM


MESSAGES = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB.",
    "RuntimeError: No executable batch size found, reached zero.",
    "Signal 9 (SIGKILL) received by PID 71",
    "ValueError: You can't train a model that has been loaded in 8-bit precision on a different "
    "device than the one you're training on.",
    "RuntimeError: Expected to mark a variable ready only once.",
    "RuntimeError: expect_autograd_hooks_ INTERNAL ASSERT FAILED",
    "RuntimeError: Expected to have finished reduction in the prior iteration before starting a "
    "new one.",
    "UserWarning: None of the inputs have requires_grad=True. Gradients will be None",
    "ValueError: Must flatten tensors with uniform dtype but got torch.bfloat16 and torch.uint8",
    "ValueError: Attempting to unscale FP16 gradients.",
    "\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'",
    'Unexpected key(s) in state_dict: "model.layers.0.weight.absmax"',
    "NotImplementedError: Using RTX 4000 series doesn't support faster communication broadband via "
    "P2P or IB.",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
    "RuntimeError: No backend type associated with device type cpu",
    "Num GPUs used = 1",
    "UserWarning: Detected call of `lr_scheduler.step()` before `optimizer.step()`.",
    "{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 1e-4}",
    "ERROR: unsloth 2026.10.9 requires transformers<=5.17.0",
    "ValueError: Your setup doesn't support bf16/gpu.",
    "RuntimeError: The NVIDIA driver on your system is too old (found version 12040)",
    "CUDA error: no kernel image is available for execution on the device",
    "The installed version of bitsandbytes was compiled without GPU support.",
    "wandb: WARNING Step must only increase in log calls. Step 40 < 55; dropping",
    "huggingface_hub.errors.GatedRepoError: 403 Client Error",
    "OSError: We couldn't connect to 'https://huggingface.co' to load this file",
    "OSError: [Errno 28] No space left on device",
    "RuntimeError: EADDRINUSE, message: address already in use",
    "Token indices sequence length is longer than the specified maximum sequence length for this "
    "model (3000 > 2048).",
    "Setting `pad_token_id` to `eos_token_id`:2 for open-end generation.",
    "Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
    "RuntimeError: the ranks' adapters or optimizer states are no longer equal before update 7: "
    "layers.0",
)


def test_every_known_message_has_a_sample_that_it_explains_first():
    firsts = Counter(id(explain(message)[0]) for message in MESSAGES)
    assert set(firsts) == {id(known) for known in KNOWN}
    assert max(firsts.values()) == 1
    assert all(known.cause.endswith(".") and known.cure.endswith(".") for known in KNOWN)
    assert explain("the moon is full") == ()


@pytest.mark.parametrize(
    "words", [["CUDA error: out of memory"], ["CUDA", "error:", "out", "of", "memory"]]
)
def test_a_message_alone_is_explained(words: list[str], capsys):
    assert main(words) == 0
    assert "A pass needs more GPU memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="preset = smollm2_dem"):
        main(["smollm2_dem"])


def test_explain_finds_a_message_in_a_long_traceback(capsys):
    assert (
        main(
            [
                "--explain",
                "Traceback\n  File x\nRuntimeError: Expected to mark a variable\n ready only once.",
            ]
        )
        == 0
    )
    assert "reentran" in capsys.readouterr().out
    assert main(["--explain", "the moon is full", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_the_command_ends_with_1_where_there_is_a_problem(here, capsys):
    words = ["r1_8b_scam", f"run.dir={here}/runs", f"model.cache_dir={here}/cache"]
    assert main(words) == 1  # no tracker login
    out = capsys.readouterr().out
    assert "PROBLEM trackers" in out and out.rstrip().endswith("1 problem")
    assert max(map(len, out.splitlines())) <= 101
    assert main([*words, "tracking.to=null", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == 0 and found["schema"] == 1


def test_the_command_checks_the_launch_file_that_it_is_given(here, capsys):
    file = here / "mine.yaml"
    file.write_text("distributed_type: FSDP")
    assert main(["smollm2_demo", "--config_file", str(file)]) == 1
    assert "FSDP shards" in capsys.readouterr().out


def test_a_finding_is_shown_with_its_cure_below():
    lines = shown(Finding(PROBLEM, "driver", "too old " * 20, "update it"))
    assert lines[0].startswith("PROBLEM driver") and lines[-1].strip() == "-> update it"
