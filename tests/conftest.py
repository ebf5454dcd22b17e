"""Tiny models and their tokenizer, made once a session: no hub, no download."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import apart  # first: libraries read HOME when they are imported
import unsearched

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks a hub is a fault
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than free cores wait for each other

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# A shell starts what it runs in the background with these ignored, and tests send them.
for _number, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

if TYPE_CHECKING:
    from glassloop.engines.peft import PeftEngine

VOCABULARY = 512
RUNS = itertools.count()
SPECIALS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]  # ids 0 .. 5
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = [
    "The caller says that your account is locked and asks for the code that was sent to your"
    " phone.",
    "A nurse calls to confirm the appointment on Tuesday at 9:30; nothing is asked for and nothing"
    " is paid.",
    "First look at who is calling, then at what they want, then at how they want it paid."
    " <think>gift cards</think>",
    "Question: what is 12 + 30? Answer: 42. Héllo, naïve café, 3.5 mg, (see below).\n\n"
    "- one\n- two\n",
]


REPOSITORY = apart.in_repository() if apart.OWNER else set()


def pytest_collection_finish() -> None:
    unsearched.begin_searches()


def pytest_runtest_setup() -> None:
    """Undo what a run in an earlier test left: it ends with SIGUSR1 ignored.

    Processes that a test starts would inherit that.
    """
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that leaves something in its temporary folder, its home or the repository."""
    if apart.OWNER and (left := apart.left_behind(REPOSITORY)):
        print(f"\nThe tests left behind {len(left)}:", *left[:40], sep="\n  ", file=sys.stderr)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    if apart.OWNER:
        apart.remove()


@pytest.fixture(scope="session", autouse=True)
def _cache_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give glassloop a cache of the session's own."""
    os.environ["GLASSLOOP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def _settings_apart() -> Iterator[None]:
    """Let a module's runs choose: Accelerate keeps a process's first precision, torch a mode."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(True)
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens with bos, eos, a pad of its own and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder of a bf16 Llama, 2 layers of hidden size 64, untied head, with the tiny tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _saved(LlamaForCausalLM(config), tiny_tokenizer, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_qwen2(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder of a Qwen2 of the same size: biases in attention, head tied to the embedding."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide a bias that is lost
    return _saved(model, tiny_tokenizer, tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers have the proportions of an 8B's, 16 times narrower."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide-llama")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _saved(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine_of() -> Callable[..., PeftEngine]:
    """Build an engine from a folder: by default fp32, unquantised, r = 4, on the CPU.

    Other fields go to ModelConfig.
    """
    from glassloop.config import LoraConfig, ModelConfig
    from glassloop.engines.build import build_engine

    def build(
        folder: Path,
        *,
        lora: LoraConfig | None = None,
        precision: str = "fp32",
        checkpointing: bool = False,
        seed: int = 0,
        **model: object,
    ) -> PeftEngine:
        return build_engine(
            ModelConfig.model_validate({"id": str(folder), "quantization": "none", **model}),
            lora or LoraConfig(r=4, alpha=8),
            precision=precision,
            checkpointing=checkpointing,
            seed=seed,
            device=torch.device("cpu"),
            first=contextlib.nullcontext,
        )

    return build


@pytest.fixture
def run_of(tmp_path: Path, tiny_llama: Path):
    """Build a run of the reference engine on 37 short rows, 8 an update, from equal adapters."""
    from accelerate.state import AcceleratorState
    from launching import write_rows

    from glassloop.config.arguments import from_values
    from glassloop.loop.build import build_run

    def build(**sections: dict):
        AcceleratorState._reset_state(True)
        values = {
            "model": {"id": str(tiny_llama)},
            "lora": {"r": 4, "alpha": 8},
            "data": {
                "source": str(write_rows(tmp_path / "rows.jsonl", 37)),
                "template": "chat",
                "max_tokens": 96,
            },
            "batch": {"size": 2, "accumulation": 4},
            "schedule": {"updates": 60, "warmup_updates": 5},
            "optimizer": {"lr": 1e-2},
            "execution": {"engine": "peft"},  # named: on a GPU the default is another
            "evaluation": {"samples": 0},
            "run": {"dir": str(tmp_path / "runs"), "name": f"run{next(RUNS)}"},
        }
        for section, fields in sections.items():
            values[section] = {**values.get(section, {}), **fields}
        return build_run(from_values(values))

    return build


@pytest.fixture
def small_files_only() -> Iterator[Callable[[int], None]]:
    """A real refusal by the system: no file may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
