"""Checkpoints: what was saved comes back byte for byte, nothing torn or foreign is restored, no
death loses the last one."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glassloop.config import Config, as_dict
from glassloop.disk import publish as folders
from glassloop.formula.optim import FlatAdapters, make_optimizer
from glassloop.saved import checkpoint
from glassloop.saved import state as snapshots
from glassloop.saved.changes import config_changes
from glassloop.saved.checkpoint import (
    CheckpointNotSaved,
    Saved,
    best_checkpoint,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from glassloop.saved.run_state import RunState

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
BASE = "sha256:base"
RANKS = 2
CONFIG = as_dict(Config.model_validate({}))


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=32,
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    return LlamaForCausalLM(config).eval()


@dataclass
class Bench:
    """A tiny run: 7,168 flat elements, enough for 8-bit states. Dropout makes each update depend on
    torch's random numbers."""

    model: Any
    adapters: FlatAdapters
    optimizer: torch.optim.Optimizer

    def update(self, count: int) -> None:
        self.model.train()
        for _ in range(count):
            self.adapters.zero_grad()
            ids = torch.tensor(
                [
                    [random.randrange(64) for _ in range(12)],
                    numpy.random.randint(0, 64, 12).tolist(),
                ]
            )  # (2, 12)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()

    def bits(self) -> dict[str, Any]:
        """Everything that a restore changes, as bytes. Padding between matrices is left out: no
        model reads it."""
        tensors, plain = snapshots.optimizer_state(self.optimizer, self.adapters.flat)
        tensors |= {
            name: place.of(self.adapters.flat.detach())
            for name, place in self.adapters.slices.items()
        }
        bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return {**bits, "plain": plain, "rng": snapshots.rng_state(CPU)}


def bench(name: str = "adamw_8bit", seed: int = 0, r: int = 2) -> Bench:
    base = base_model()
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=r, lora_alpha=16, lora_dropout=0.2, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    adapters = FlatAdapters(model.named_parameters())
    return Bench(
        model,
        adapters,
        make_optimizer(
            name, adapters.flat, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01
        ),
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "the tokenizer's own"
    return made


def state_at(update: int, **changed: Any) -> RunState:
    state = RunState(update=update, epoch=0, world_size=RANKS, base_hash=BASE, config=CONFIG)
    return replace(
        state,
        **{"versions": {"torch": torch.__version__}, "tracker_ids": {"wandb": "abc"}, **changed},
    )


def save(run: Path, one: Bench, tokenizer: Any, state: RunState, keep: int = 9) -> Saved:
    return save_checkpoint(
        run / "checkpoints",
        state,
        adapters=one.adapters,
        peft_model=one.model,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        base_id="org/base",
        base_revision="0123abc",
        optimizer=one.optimizer,
        rng_states=[snapshots.rng_state(CPU)] * state.world_size,
        keep=keep,
    )


def load(path: Path, one: Bench, rank: int = 1, **changed: Any) -> RunState:
    given = {"world_size": RANKS, "base_hash": BASE, "config": CONFIG, **changed}
    return load_checkpoint(path, adapters=one.adapters, optimizer=one.optimizer, rank=rank, **given)


@pytest.fixture(scope="module")
def trained() -> Bench:
    one = bench()
    one.update(2)
    return one


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, trained: Bench, tokenizer: Any) -> Path:
    """A run folder with the checkpoints 20 and 40; never changed, copied."""
    run = tmp_path_factory.mktemp("run")
    for update in (20, 40):
        save(run, trained, tokenizer, state_at(update))
    return run


@pytest.fixture
def run(tmp_path: Path, original: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def at_40(run: Path) -> Path:
    return run / "checkpoints/update_000040"


@pytest.fixture(scope="module")
def scratch() -> Bench:
    """A run to load into."""
    return bench(seed=3)


@pytest.fixture(scope="module")
def other() -> Bench:
    """The run that refused checkpoints are tried on: it must stay as it is."""
    one = bench(seed=5)
    one.update(1)
    return one


def refused(path: Path, one: Bench, **changed: Any) -> str:
    """The message of a refusal that changed nothing."""
    before = one.bits()
    with pytest.raises(ValueError) as error:  # noqa: PT011 (each test looks at the message)
        load(path, one, **changed)
    assert one.bits() == before, "a refused checkpoint changed something"
    assert str(path) in str(error.value)
    assert "rank 1" in str(error.value)
    return str(error.value)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


# What comes back


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw", "sgd"])
def test_a_resumed_run_is_the_uninterrupted_one_byte_for_byte(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    one = bench(name)
    one.update(3)
    state = state_at(3, details={"windows": [1.5, None]}, attempt=2, loss_scale=1024.0)
    saved = save(tmp_path, one, tokenizer, state)
    at_save = one.bits()
    one.update(2)
    again = bench(name, seed=9)
    again.update(1)
    assert load(saved.path, again) == replace(state, serial=1)
    assert again.bits() == at_save
    again.update(2)
    assert again.bits() == one.bits()
    again.adapters.check_views()


def test_eight_bit_states_are_stored_as_eight_bits(at_40: Path) -> None:
    tensors = load_file(at_40 / "optimizer.safetensors")
    assert tensors["state1"].dtype == tensors["state2"].dtype == torch.uint8
    assert sorted(tensors) == ["absmax1", "absmax2", "qmap1", "qmap2", "state1", "state2"]


def test_a_parameter_too_small_for_eight_bits_comes_back_too() -> None:
    flat = torch.nn.Parameter(torch.ones(256))
    optimizer = make_optimizer(
        "adamw_8bit", flat, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    flat.grad = torch.ones(256)
    optimizer.step()
    tensors, plain = snapshots.optimizer_state(optimizer, flat)
    assert tensors["state1"].dtype == torch.float32
    built = snapshots.built_optimizer_state(optimizer, flat, tensors, plain)
    assert built.keys() == optimizer.state[flat].keys()
    assert torch.equal(built["state2"], optimizer.state[flat]["state2"])


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw", "sgd"])
def test_a_run_saved_before_its_first_step_has_no_optimizer_state(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    one = bench(name)
    saved = save(tmp_path, one, tokenizer, state_at(0))
    one.update(1)
    expected = one.bits()
    load(saved.path, one)
    assert not one.optimizer.state
    one.update(1)
    assert one.bits() == expected
    again = bench(name, seed=9)
    again.update(1)
    load(saved.path, again)
    again.update(1)
    assert again.bits() == one.bits()


def test_the_state_of_every_rank_is_its_own(tmp_path: Path, trained: Bench, tokenizer: Any) -> None:
    rngs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        rngs.append(snapshots.rng_state(CPU))
    arguments = dict(
        adapters=trained.adapters,
        peft_model=trained.model,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    arguments |= dict(
        base_id="org/base", base_revision=None, optimizer=trained.optimizer, rng_states=rngs, keep=1
    )
    saved = save_checkpoint(tmp_path, state_at(1), **arguments)  # type: ignore[arg-type]
    for rank, seed in enumerate((1, 2)):
        load(saved.path, trained, rank=rank)
        drawn = torch.rand(4)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(4))


def test_peft_loads_the_adapter_and_gives_the_same_logits(at_40: Path, trained: Bench) -> None:
    ids = torch.arange(12)[None]  # (1, 12)
    trained.model.eval()
    loaded = PeftModel.from_pretrained(base_model(), at_40).eval()
    with torch.no_grad():
        expected, logits, plain = (
            model(input_ids=ids).logits for model in (trained.model, loaded, base_model())
        )
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, plain)
    described = json.loads((at_40 / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("org/base", "0123abc")
    assert described["inference_mode"] is True


def test_adapter_names_are_pefts_own_and_no_base_weight_is_saved(
    at_40: Path, trained: Bench
) -> None:
    saved = load_file(at_40 / "adapter_model.safetensors")
    assert (
        saved.keys() == get_peft_model_state_dict(trained.model, save_embedding_layers=False).keys()
    )
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert all(".lora_" in name for name in saved)
    held = sum(tensor.numel() for tensor in saved.values())
    assert held == trained.adapters.trainable
    weights = sum(path.stat().st_size for path in at_40.glob("*.safetensors"))
    assert (
        weights < 6 * trained.adapters.flat.numel() + 20_000
    )  # 4 bytes a weight, 2 of optimizer state, names


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("m.q_proj.lora_A.default.weight", "m.q_proj.lora_A.weight"),
        ("m.embed.lora_embedding_A.default", "m.embed.lora_embedding_A"),
        ("m.default.q_proj.lora_B.default.weight", "m.default.q_proj.lora_B.weight"),
        ("m.default_q.lora_B.default.weight", "m.default_q.lora_B.weight"),
    ],
)
def test_only_the_adapters_name_is_left_out_of_a_name(name: str, saved: str) -> None:
    assert checkpoint.saved_name(name) == saved


def test_the_tokenizer_comes_with_the_given_template_and_keeps_its_own(
    at_40: Path, tokenizer: Any
) -> None:
    loaded = AutoTokenizer.from_pretrained(at_40)
    assert loaded.chat_template == TEMPLATE == (at_40 / "chat_template.jinja").read_text()
    turns = [{"role": "user", "content": "a b"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == "<s>a b"
    assert loaded("a b").input_ids == tokenizer("a b").input_ids == [3, 4]
    assert tokenizer.chat_template == "the tokenizer's own"


def test_a_checkpoint_holds_json_safetensors_and_text_only(at_40: Path) -> None:
    kinds = {path.suffix for path in at_40.iterdir() if path.name != "SHA256SUMS"}
    assert kinds == {".json", ".safetensors", ".jinja"}
    for module in (checkpoint, folders, snapshots):
        source = Path(str(module.__file__)).read_text()
        assert "torch.load(" not in source.replace("safetensors.torch.load(", "")
        assert "import pickle" not in source


def test_sums_are_those_of_sha256sum(at_40: Path) -> None:
    lines = (at_40 / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(
        p.name for p in at_40.iterdir() if p.name != "SHA256SUMS"
    )
    if shutil.which("sha256sum"):
        assert os.system(f"cd {at_40} && sha256sum -c --strict --quiet SHA256SUMS") == 0


# What is refused


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit flipped": flip,
    "longer": lambda data: data + b" ",
}
FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "optimizer.json",
    "state.json",
]
FILES += [
    "rng_rank0.json",
    "rng_rank1.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "SHA256SUMS",
]
PARSED = [
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "state.json",
    "rng_rank1.json",
]


def test_the_files_of_a_checkpoint_are_those_that_are_damaged_here(at_40: Path) -> None:
    assert sorted(FILES) == sorted(path.name for path in at_40.iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(
    name: str, damage: str, at_40: Path, other: Bench, run: Path
) -> None:
    data = DAMAGE[damage]((at_40 / name).read_bytes())
    (at_40 / name).unlink()
    if data is not None:
        (at_40 / name).write_bytes(data)
    assert name in refused(at_40, other)
    found, notes = last_checkpoint(run)
    assert found == run / "checkpoints/update_000020"
    assert len(notes) == 1
    assert str(at_40) in notes[0]
    assert name in notes[0]


def test_sums_cut_at_any_line_are_refused(at_40: Path, other: Bench) -> None:
    lines = (at_40 / "SHA256SUMS").read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        (at_40 / "SHA256SUMS").write_text("".join(lines[:count]))
        assert "SHA256SUMS is " in (message := refused(at_40, other))
        assert "cut short" in message


def test_any_flipped_byte_is_refused(at_40: Path) -> None:
    draw = random.Random(7)
    for _ in range(150):
        path = draw.choice(sorted(at_40.iterdir()))
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(
            data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]
        )
        with pytest.raises(ValueError, match=r"corrupt|cut short|missing"):
            folders.read(at_40, checkpoint.REQUIRED)
        path.write_bytes(data)
    folders.read(at_40, checkpoint.REQUIRED)


def resum(folder: Path, changed: str) -> None:
    """Make the sum of a file right again, as someone who forges a checkpoint would."""
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = [
        (folders._digest((folder / name).read_bytes()) if name == changed else digest, name)
        for digest, name in lines
    ]
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


def forge(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a JSON or safetensors file holds, sums included."""
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)
    resum(folder, name)


def without(plain: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key != name}


LONG = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FORGED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a list for a state": ("state.json", lambda s: [s], "no schema"),
    "a newer schema": ("state.json", lambda s: s | {"schema": 99}, "schema 99"),
    "a field missing": ("state.json", lambda s: without(s, "base_hash"), "base_hash"),
    "a field unknown": ("state.json", lambda s: s | {"spell": 1}, "spell"),
    "a field of a wrong type": ("state.json", lambda s: s | {"update": "40"}, "update is '40'"),
    "a list of nothing for a map": ("state.json", lambda s: s | {"config": []}, "config is []"),
    "null where a value must be": (
        "state.json",
        lambda s: s | {"attempt": None},
        "attempt is None",
    ),
    "another optimizer": ("optimizer.json", lambda s: s | {"optimizer": "AdamW"}, "AdamW"),
    "another size": ("optimizer.json", lambda s: s | {"elements": 5}, "elements = 5"),
    "no values": ("optimizer.json", lambda s: without(s, "values"), "holds no values"),
    "no count of steps": ("optimizer.json", lambda s: s | {"values": {}}, "step is None"),
    "no list": ("optimizer.json", lambda s: [], "holds no values"),
    "a moment missing": ("optimizer.safetensors", lambda s: without(s, "state2"), "state2"),
    "a moment cut": (
        "optimizer.safetensors",
        lambda s: s | {"state1": s["state1"][:-256].clone()},
        "state1",
    ),
    "a moment cast": (
        "optimizer.safetensors",
        lambda s: s | {"absmax1": s["absmax1"].half()},
        "absmax1",
    ),
    "a matrix missing": ("adapter_model.safetensors", lambda s: without(s, LONG), LONG),
    "a matrix too many": (
        "adapter_model.safetensors",
        lambda s: s | {"lm_head": torch.ones(3)},
        "lm_head",
    ),
    "a matrix turned": (
        "adapter_model.safetensors",
        lambda s: s | {LONG: s[LONG].T.contiguous()},
        LONG,
    ),
    "a matrix cast": (
        "adapter_model.safetensors",
        lambda s: s | {LONG: s[LONG].bfloat16()},
        "bfloat16",
    ),
    "no python state": ("rng_rank1.json", lambda s: without(s, "python"), "rng_rank1.json"),
    "a short python state": (
        "rng_rank1.json",
        lambda s: s | {"python": [3, [1, 2], None]},
        "rng_rank1.json",
    ),
    "a numpy state of another kind": (
        "rng_rank1.json",
        lambda s: s | {"numpy": ["PCG64", [], 1, 0, 0.0]},
        "rng_rank1.json",
    ),
    "a short torch state": ("rng_rank1.json", lambda s: s | {"torch": "00ff"}, "rng_rank1.json"),
    "a torch state that is no hex": (
        "rng_rank1.json",
        lambda s: s | {"torch": "zz"},
        "rng_rank1.json",
    ),
    "a GPU's numbers": ("rng_rank1.json", lambda s: s | {"cuda": "00" * 16}, "a run on cuda"),
}


@pytest.mark.parametrize(("name", "change", "complaint"), FORGED.values(), ids=FORGED)
def test_a_forged_file_is_refused(
    name: str, change: Callable[[Any], Any], complaint: str, at_40: Path, other: Bench
) -> None:
    forge(at_40, name, change)
    message = refused(at_40, other)
    assert complaint in message
    assert name.partition(".")[0] in message or "optimizer state" in message


@pytest.mark.parametrize("name", PARSED)
@pytest.mark.parametrize("junk", [b"\x80\x04junk", b"", b"[" * 100_000, b'{"a": NaN', b"\xff\xfe"])
def test_junk_with_a_right_sum_is_refused(
    name: str, junk: bytes, at_40: Path, other: Bench
) -> None:
    (at_40 / name).write_bytes(junk)
    resum(at_40, name)
    assert name in refused(at_40, other)


@pytest.mark.parametrize(
    "name", ["../state.json", "/etc/passwd", "..", "a/b", ".hidden", "a\\b", "", "state.json"]
)
def test_a_name_in_the_sums_cannot_leave_the_folder_or_come_twice(
    name: str, at_40: Path, other: Bench
) -> None:
    with open(at_40 / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    assert "SHA256SUMS is corrupt at" in refused(at_40, other)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_link_or_a_folder_in_place_of_a_file_is_refused(
    kind: str, at_40: Path, other: Bench, tmp_path: Path
) -> None:
    (at_40 / "state.json").rename(tmp_path / "elsewhere.json")
    if kind == "link":
        (at_40 / "state.json").symlink_to(tmp_path / "elsewhere.json")
    else:
        (at_40 / "state.json").mkdir()
    assert "not a plain file: it was not followed" in refused(at_40, other)


def test_files_that_are_not_listed_are_left_alone(at_40: Path, scratch: Bench) -> None:
    (at_40 / "notes.txt").write_text("mine")
    load(at_40, scratch)


def test_the_numbers_of_each_rank_must_be_listed(at_40: Path, other: Bench) -> None:
    lines = (at_40 / "SHA256SUMS").read_text().splitlines(keepends=True)
    (at_40 / "SHA256SUMS").write_text("".join(line for line in lines if "rng_rank0" not in line))
    assert "does not list rng_rank0.json" in refused(at_40, other)


def test_another_number_of_ranks_is_refused_with_both(at_40: Path, other: Bench) -> None:
    message = refused(at_40, other, world_size=3)
    assert "saved by 2 ranks, this run has 3" in message
    assert "--num_processes 2" in message


def test_another_base_is_refused_with_both(at_40: Path, other: Bench) -> None:
    message = refused(at_40, other, base_hash="sha256:else")
    assert BASE in message
    assert "sha256:else" in message


def test_another_model_is_refused(at_40: Path) -> None:
    assert "adapter_model.safetensors" in refused(at_40, bench(r=4))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_another_optimizer_is_refused(name: str, at_40: Path) -> None:
    message = refused(at_40, bench(name))
    assert "AdamW8bit" in message


def changed_config(field: str, value: Any) -> dict[str, Any]:
    plain = json.loads(json.dumps(CONFIG))
    section, _, name = field.rpartition(".")
    (plain[section] if section else plain)[name] = value
    return plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("model.id", "org/other"),
        ("model.quantization", "none"),
        ("lora.alpha", 32.0),
        ("lora.targets", ["q_proj"]),
        ("data.rows", 7),
        ("data.columns", {"question": "q"}),
        ("batch.size", 4),
        ("schedule.updates", 120),
        ("optimizer.lr", 1e-3),
        ("optimizer.max_grad_norm", None),
    ],
)
def test_a_field_that_says_what_an_update_computes_is_refused_with_both_values(
    field: str, value: Any, at_40: Path, other: Bench, scratch: Bench
) -> None:
    config = changed_config(field, value)
    (changed, (old, new)), *_ = config_changes(CONFIG, config).items()
    message = refused(at_40, other, config=config)
    assert f"{changed} was {old!r} and now is {new!r}" in message
    allowed = list(config_changes(CONFIG, config))
    load(at_40, scratch, config=config, allow_changed=allowed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "mine"),
        ("execution.layout", "packed"),
        ("execution.checkpointing", False),
        ("record.text", "full"),
        ("tracking.to", ["wandb"]),
        ("evaluation.every_updates", 5),
        ("checkpoint.keep", 1),
        ("stability.on_nonfinite", "skip"),
        ("run.name", "other"),
        ("resume.run", "runs/other"),
        ("model.cache_dir", "/cache"),
        ("model.init_adapter", "adapter"),
        ("batch.ranks", 2),
    ],
)
def test_a_field_that_does_not_is_free(field: str, value: Any, at_40: Path, scratch: Bench) -> None:
    assert load(at_40, scratch, config=changed_config(field, value)).update == 40


def test_changes_are_found_whatever_the_container() -> None:
    assert config_changes({"a": {"b": (1, 2)}, "c": 1}, {"a": {"b": [1, 2]}, "c": 1}) == {}
    assert config_changes({"a": {"b": 1}, "c": 1}, {"a": {"d": 2}, "c": 1}) == {
        "a.b": (1, None),
        "a.d": (None, 2),
    }


def test_a_state_written_without_later_fields_opens(at_40: Path, scratch: Bench) -> None:
    later = (
        "versions",
        "attempt",
        "loss_scale",
        "finite_updates",
        "heldout_loss_nats",
        "tracker_ids",
        "details",
        "serial",
    )
    forge(
        at_40,
        "state.json",
        lambda s: (
            {"order_seed": 3407}  # older ones have it
            | {name: value for name, value in s.items() if name not in later}
        ),
    )
    assert load(at_40, scratch) == RunState(40, 0, RANKS, BASE, CONFIG)


# Random numbers


def test_random_numbers_come_back_in_the_middle_of_a_pair_of_normals() -> None:
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    random.gauss(0, 1)
    numpy.random.normal()
    torch.randn(3)
    state = json.loads(json.dumps(snapshots.rng_state(CPU)))
    drawn = [(random.gauss(0, 1), numpy.random.normal(), torch.randn(3).tolist()) for _ in range(2)]
    snapshots.restore_rng(state, CPU)
    assert [
        (random.gauss(0, 1), numpy.random.normal(), torch.randn(3).tolist()) for _ in range(2)
    ] == drawn


@pytest.mark.parametrize(
    "broken", [{}, [], None, {"python": 1, "numpy": 2, "torch": 3, "cuda": None}]
)
def test_malformed_random_numbers_are_refused_and_change_nothing(broken: Any) -> None:
    before = snapshots.rng_state(CPU)
    with pytest.raises(ValueError, match="malformed state of random numbers"):
        snapshots.restore_rng(broken, CPU)
    assert snapshots.rng_state(CPU) == before


# Which are kept, and which is found


def test_older_ones_go_but_the_best_by_heldout_loss_stays(
    tmp_path: Path, trained: Bench, tokenizer: Any
) -> None:
    losses = {10: 2.0, 20: 1.0, 30: 1.5, 40: None, 50: 1.0000001, 60: math.nan, 70: None}
    for update, loss in losses.items():
        saved = save(tmp_path, trained, tokenizer, state_at(update, heldout_loss_nats=loss), keep=2)
    assert names(tmp_path) == ["update_000020", "update_000060", "update_000070"]
    assert saved.removed == (tmp_path / "checkpoints/update_000050",)
    best = tmp_path / "checkpoints/update_000020"
    assert saved.best == best_checkpoint(tmp_path) == best
    pointer = json.loads((tmp_path / "checkpoints/best.json").read_text())
    assert pointer == {
        "schema": 1,
        "folder": "update_000020",
        "update": 20,
        "heldout_loss_nats": 1.0,
    }
    PeftModel.from_pretrained(base_model(), best)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoints/update_000070", ())
    saved = save(tmp_path, trained, tokenizer, state_at(80, heldout_loss_nats=0.5), keep=1)
    assert names(tmp_path) == ["update_000080"]
    assert saved.best == saved.path


def test_without_heldout_loss_there_is_no_best(run: Path) -> None:
    assert best_checkpoint(run) is None
    assert not (run / "checkpoints/best.json").exists()


def test_after_a_resume_from_an_older_one_its_successors_are_the_newest(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    saved = save(run, trained, tokenizer, state_at(30), keep=2)
    assert names(run) == ["update_000030", "update_000040"]
    assert last_checkpoint(run)[0] == saved.path
    saved = save(run, trained, tokenizer, state_at(35), keep=2)
    assert names(run) == ["update_000030", "update_000035"]
    assert last_checkpoint(run)[0] == saved.path


def test_a_second_checkpoint_of_an_update_takes_the_first_ones_place(
    run: Path, trained: Bench, scratch: Bench, tokenizer: Any
) -> None:
    saved = save(run, trained, tokenizer, state_at(40, attempt=2))
    assert names(run) == ["update_000020", "update_000040"]
    assert load(saved.path, scratch).attempt == 2


def test_one_that_was_replaced_is_removed_by_the_next_save_and_is_never_the_best(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    best = save(run, trained, tokenizer, state_at(40, heldout_loss_nats=2.0)).best
    aside = run / "checkpoints/update_000040.replaced"
    shutil.copytree(run / "checkpoints/update_000040", aside)
    forge(aside, "state.json", lambda s: s | {"serial": 2, "heldout_loss_nats": 1.0})
    assert best_checkpoint(run) == best == aside.with_suffix("")
    assert save(run, trained, tokenizer, state_at(60), keep=3).removed == (aside,)
    assert names(run) == ["update_000020", "update_000040", "update_000060"]


def test_one_that_was_replaced_is_found_while_the_new_one_is_not_there(
    run: Path, scratch: Bench
) -> None:
    (run / "checkpoints/update_000040").rename(run / "checkpoints/update_000040.replaced")
    found, notes = last_checkpoint(run)
    assert (found, notes) == (run / "checkpoints/update_000040.replaced", ())
    assert found is not None
    assert load(found, scratch).update == 40


def test_a_run_without_checkpoints_has_no_last_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) == (None, ())
    assert best_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints/update_000020").mkdir(parents=True)
    found, notes = last_checkpoint(tmp_path)
    assert found is None
    assert "SHA256SUMS is missing" in notes[0]


def test_other_things_in_the_folder_are_neither_read_nor_removed(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    for name in (".ipynb_checkpoints", "update_backup", "mine"):
        (run / "checkpoints" / name).mkdir()
    save(run, trained, tokenizer, state_at(60), keep=1)
    assert names(run) == [".ipynb_checkpoints", "mine", "update_000060", "update_backup"]
    assert last_checkpoint(run) == (run / "checkpoints/update_000060", ())


# Dying, and a disk that refuses

STEPS = ("fsync", "rename", "mkdir", "rmtree", "open", "tokenizer")


def watch(on_step: Callable[[str, Any], None], patch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Call on_step(kind, argument) before every step of a save that touches the disk."""

    def before(kind: str, place: Any, name: str, raising: bool = True) -> None:
        genuine = getattr(place, name) if raising else open

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            on_step(kind, args)
            return genuine(*args, **kwargs)

        patch.setattr(place, name, wrapped, raising=raising)

    for name in ("fsync", "rename", "mkdir"):
        before(name, os, name)
    before("rmtree", shutil, "rmtree")
    before("open", folders, "open", raising=False)
    before("tokenizer", tokenizer, "save_pretrained")


def steps_of_a_save(
    tmp_path: Path, original: Path, trained: Bench, tokenizer: Any, update: int
) -> int:
    count = [0]

    def on_step(kind: str, argument: Any) -> None:
        count[0] += 1

    run = shutil.copytree(original, tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        watch(on_step, patch, tokenizer)
        save(run, trained, tokenizer, state_at(update), keep=1)
    return count[0]


def whole(run: Path, name: str) -> bool:
    try:
        folders.read(run / "checkpoints" / name, checkpoint.REQUIRED)
    except ValueError:
        return False
    return True


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("update", "error"),
    [(60, FULL), (40, FULL), (60, KeyboardInterrupt())],
    ids=["full", "full, again", "ctrl-c"],
)
def test_a_failure_at_any_step_publishes_nothing_half_and_removes_nothing_early(
    update: int,
    error: BaseException,
    tmp_path: Path,
    original: Path,
    trained: Bench,
    scratch: Bench,
    tokenizer: Any,
) -> None:
    outcomes = []
    for fatal in range(steps_of_a_save(tmp_path, original, trained, tokenizer, update)):
        run = shutil.copytree(original, tmp_path / f"at_{fatal}")
        left = [fatal]

        def on_step(kind: str, argument: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise error

        with pytest.MonkeyPatch.context() as patch:
            watch(on_step, patch, tokenizer)
            try:
                notes = save(run, trained, tokenizer, state_at(update, attempt=2), keep=1).notes
                outcomes.append("untidy" if notes else "saved")
                assert error.__class__ is OSError
            except CheckpointNotSaved as refusal:
                outcomes.append("refused")
                assert str(run / "checkpoints") in str(refusal)
                assert "free space there" in str(refusal)
            except KeyboardInterrupt:
                outcomes.append("interrupted")
        found, _ = last_checkpoint(run)
        assert found is not None
        published = load(found, scratch).attempt == 2
        assert not published or found.name == f"update_{update:06d}"
        if not published:
            assert whole(run, "update_000020")
            assert whole(run, "update_000040") or whole(run, "update_000040.replaced")
        assert all(whole(run, name) for name in names(run) if name.startswith("update_"))
        if outcomes[-1] == "refused" and not published:
            assert not [name for name in names(run) if name.endswith(".writing")]
        again = save(run, trained, tokenizer, state_at(80, attempt=3), keep=1)
        assert not again.notes
        assert names(run) == ["update_000080"]
    assert outcomes.count("refused") + outcomes.count("interrupted") > 20
    assert tokenizer.chat_template == "the tokenizer's own"


def killed_save(
    run: Path, fatal: int, half: bool, synced: Path, one: Bench, tokenizer: Any, update: int
) -> None:
    """Save in a forked process that kills itself before step `fatal`, or in its write; note which
    inodes were synced."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    try:
        count = [0]
        log = os.open(synced, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def on_step(kind: str, argument: Any) -> None:
            count[0] += 1
            if count[0] > fatal:
                if half and kind == "open":
                    with open(argument[0], "wb") as file:
                        file.write(b"{")
                die()
            if kind == "fsync":
                os.write(log, f"{os.fstat(argument[0]).st_ino}\n".encode())

        watch(on_step, pytest.MonkeyPatch(), tokenizer)
        save(run, one, tokenizer, state_at(update, attempt=2), keep=1)
        die()
    finally:
        os._exit(3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("update", "half"),
    [(60, False), (40, False), (60, True)],
    ids=["new", "again", "new, half a file"],
)
def test_a_kill_at_any_step_loses_at_most_the_checkpoint_under_way_also_without_power(
    half: bool,
    update: int,
    tmp_path: Path,
    original: Path,
    trained: Bench,
    scratch: Bench,
    tokenizer: Any,
) -> None:
    kills = steps_of_a_save(tmp_path, original, trained, tokenizer, update)
    assert kills > 25
    published = 0
    for fatal in range(kills + 1):
        run, synced = (
            shutil.copytree(original, tmp_path / f"at_{fatal}"),
            tmp_path / f"synced_{fatal}",
        )
        old = {str(path.stat().st_ino) for path in run.rglob("*")}
        killed_save(run, fatal, half, synced, trained, tokenizer, update)
        safe = old | set(synced.read_text().split())
        for path in run.rglob("*"):  # the power fails too: what was never synced is gone
            if path.is_file() and str(path.stat().st_ino) not in safe:
                path.write_bytes(b"")
        assert all(whole(run, name) for name in names(run) if name.startswith("update_"))
        found, _ = last_checkpoint(run)
        assert found is not None
        if load(found, scratch).attempt == 2:
            published += 1
        else:
            assert whole(run, "update_000020"), (
                "an older checkpoint went before the new one was there"
            )
        assert not (run / "checkpoints/update_000040").exists() or whole(run, "update_000040")
        again = save(run, trained, tokenizer, state_at(update, attempt=3), keep=1)
        assert (names(run), again.notes) == ([f"update_{update:06d}"], ())
    assert 5 < published < kills


def trace_of(run: Path, one: Bench, tokenizer: Any, state: RunState) -> list[tuple[str, str, str]]:
    """(step, name, second name) of every sync, rename and removal."""
    seen: list[tuple[str, str, str]] = []

    def on_step(kind: str, argument: Any) -> None:
        if kind == "fsync":
            seen.append(
                (
                    kind,
                    os.readlink(f"/proc/self/fd/{argument[0]}")
                    .removeprefix(f"{run}/checkpoints")
                    .lstrip("/"),
                    "",
                )
            )
        elif kind in ("rename", "rmtree"):
            seen.append(
                (kind, *[Path(part).name for part in argument[:2]], *[""] * (2 - len(argument[:2])))
            )  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        watch(on_step, patch, tokenizer)
        save(run, one, tokenizer, state, keep=1)
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_synced_then_their_folder_then_the_rename_then_the_parent_then_older_ones_go(
    run: Path, trained: Bench, tokenizer: Any
) -> None:
    run = run.resolve()
    seen = trace_of(run, trained, tokenizer, state_at(60, heldout_loss_nats=1.0))
    work = ".update_000060.writing"
    rename = seen.index(("rename", work, "update_000060"))
    files = {path.name for path in (run / "checkpoints/update_000060").iterdir()}
    before = seen[:rename]
    assert {
        name.removeprefix(f"{work}/") for kind, name, _ in before if kind == "fsync"
    } == files | {work}
    assert before[-1] == ("fsync", work, "")
    assert seen[rename + 1] == ("fsync", "", "")
    old = ("update_000020", "update_000040")
    removals = [
        place for place, (kind, name, _) in enumerate(seen) if kind == "rmtree" or name in old
    ]
    assert len(removals) == 4
    assert min(removals) > rename + 1
    hidden = f".best.json.{os.getpid()}.writing"
    best = seen.index(("rename", hidden, "best.json"))
    assert ("fsync", hidden, "") in seen[rename:best]


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free space there, lower checkpoint.keep"),
        (errno.EDQUOT, "free space there"),
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.EIO, "see whether the disk is healthy"),
    ],
)
def test_a_disk_that_refuses_is_named_with_the_cure(
    number: int,
    cure: str,
    run: Path,
    trained: Bench,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(CheckpointNotSaved) as error:
            save(run, trained, tokenizer, state_at(60), keep=1)
    assert cure in str(error.value)
    assert str(run / "checkpoints/update_000060") in str(error.value)
    assert os.strerror(number) in str(error.value)
    assert names(run) == ["update_000020", "update_000040"]


def test_a_file_where_the_folder_should_be_is_named(
    tmp_path: Path, trained: Bench, tokenizer: Any
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointNotSaved, match="checkpoints/update_000060 was not saved"):
        save(tmp_path, trained, tokenizer, state_at(60))


@pytest.fixture
def small_files_only() -> Iterator[Callable[[int], None]]:
    """A real refusal by the system: no file may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [50, 700, 20_000], ids=["template", "tokenizer", "weights"])
def test_a_file_that_cannot_grow_is_an_error_that_names_the_folder(
    size: int, run: Path, trained: Bench, tokenizer: Any, small_files_only: Callable[[int], None]
) -> None:
    small_files_only(size)
    with pytest.raises(
        CheckpointNotSaved, match=r"update_000060 was not saved: .*File too large.*free space there"
    ):
        save(run, trained, tokenizer, state_at(60), keep=1)
    small_files_only(resource.RLIM_INFINITY)
    assert names(run) == ["update_000020", "update_000040"]
    assert save(run, trained, tokenizer, state_at(60)).notes == ()


def test_a_failure_that_is_not_the_disks_is_not_called_so(
    run: Path, trained: Bench, tokenizer: Any, monkeypatch: Any
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such template")

    monkeypatch.setattr(tokenizer, "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="no such template"):
        save(run, trained, tokenizer, state_at(60))
    assert names(run) == ["update_000020", "update_000040"]


def test_a_field_that_an_older_version_did_not_know_may_have_its_default_now(
    tmp_path: Path, trained: Bench, tokenizer: Any, other: Bench, scratch: Bench
) -> None:
    old = changed_config("seed", 3407)
    del old["schedule"]["warmup_share"], old["data"]["columns"]["question"]
    saved = save(tmp_path, trained, tokenizer, state_at(20, config=old)).path
    message = refused(saved, other, config=changed_config("schedule.warmup_share", 0.5))
    assert "schedule.warmup_share was None and now is 0.5" in message
    assert load(saved, scratch).update == 20
