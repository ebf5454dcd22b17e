"""Known messages, columns, and the command `glassloop doctor`."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from schemas import conform

from glassloop.cli.doctor import check_data, main, shown
from glassloop.config.arguments import parse
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
from glassloop.doctor.known_errors import KNOWN, explain


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
    assert conform("doctor-message", json.loads(capsys.readouterr().out))["found"] == []
    assert main(["--explain", "Expected to mark a variable ready only once", "--json"]) == 0
    assert conform("doctor-message", json.loads(capsys.readouterr().out))["found"]


def test_the_command_ends_with_1_where_there_is_a_problem(here, capsys):
    words = ["r1_8b_scam", f"run.dir={here}/runs", f"model.cache_dir={here}/cache"]
    assert main(words) == 1  # no tracker login
    out = capsys.readouterr().out
    assert "PROBLEM trackers" in out and out.rstrip().endswith("1 problem")
    # A folder's name is one word, as long as it is.
    assert max(len(line) for line in out.splitlines() if str(here) not in line) <= 101
    assert main([*words, "tracking.to=null", "--json"]) == 0
    found = conform("doctor", json.loads(capsys.readouterr().out))
    assert found["problems"] == 0 and found["schema"] == 1


def test_the_command_checks_the_launch_file_that_it_is_given(here, capsys):
    file = here / "mine.yaml"
    file.write_text("distributed_type: FSDP")
    assert main(["smollm2_demo", "--config_file", str(file)]) == 1
    assert "FSDP shards" in capsys.readouterr().out


def test_a_finding_is_shown_with_its_cure_below():
    lines = shown(Finding(PROBLEM, "driver", "too old " * 20, "update it"))
    assert lines[0].startswith("PROBLEM driver") and lines[-1].strip() == "-> update it"
