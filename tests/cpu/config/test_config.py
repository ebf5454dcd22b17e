"""From words to a config: precedence, presets, and what is refused with which cure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from glassloop.config import Config, as_dict
from glassloop.config.arguments import from_values, parse, to_yaml
from glassloop.config.hardware import BF16
from glassloop.config.names import PEER_NAMES, ConfigError, field_names
from glassloop.config.presets import PRESETS


def test_command_line_beats_file_beats_hardware_beats_preset(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optimizer:\n  lr: 1e-4\n  eps: 1e-7\nbatch:\n  size: 8\n")
    config = parse(
        ["r1_8b_scam", "--hardware", "2xa100", "--config", str(file), "optimizer.lr=5e-5"]
    )
    assert config.optimizer.lr == 5e-5  # command line
    assert (config.optimizer.eps, config.batch.size) == (1e-7, 8)  # file
    assert config.batch.ranks == 2  # hardware
    assert config.data.rows == 600  # preset
    assert config.optimizer.weight_decay == 0.01  # default


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_its_own_yaml(preset: str) -> None:
    config = parse([preset])
    assert config.preset == preset
    assert from_values(yaml.safe_load(to_yaml(config))) == config


def test_the_recipe_value_for_value() -> None:
    config = parse(["r1_8b_scam"])
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, len(config.lora.targets)) == (
        16,
        16,
        0,
        7,
    )
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == (
        "adamw_8bit",
        2e-4,
        0.01,
    )
    assert (config.schedule.updates, config.schedule.warmup_updates, config.seed) == (60, 5, 3407)
    assert (
        config.batch.size,
        config.batch.accumulation_for(2),
        config.batch.accumulation_for(1),
    ) == (2, 4, 8)
    assert (config.data.max_tokens, config.execution.checkpointing, config.execution.layout) == (
        2048,
        True,
        "literal",
    )


@pytest.mark.parametrize("hardware", ["cpu", "t4", "3090", "2x3090", "4xA100", "2x5060ti"])
@pytest.mark.parametrize("preset", ["r1_8b_scam", "r1_8b_medical"])
def test_hardware_changes_how_an_update_is_carried_out_and_not_what_it_is(
    preset: str, hardware: str
) -> None:
    plain, on_cards = as_dict(parse([preset])), as_dict(parse([preset, "--hardware", hardware]))
    for section in plain:
        if section not in ("execution", "batch", "memory"):
            assert plain[section] == on_cards[section]
    ranks = on_cards["batch"]["ranks"] or 1
    assert (
        on_cards["batch"]["size"]
        * ranks
        * parse([preset, "--hardware", hardware]).batch.accumulation_for(ranks)
        == 16
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--per_device_train_batch_size", "4"],
            "per_device_train_batch_size is not a field of glassloop: it is called batch.size here",
        ),
        (["--batch.siez", "4"], "did you mean batch.size"),
        (["--batch.size", "x"], "batch.size = 'x'"),
        (["--batch.size=-1"], "batch.size = '-1'"),
        (["--optimizer.name=sgdd"], "optimizer.name = 'sgdd'"),
        (["batch.size=3", "batch.ranks=2"], "batch.size could be 1, 2, 4, 8"),
        (["data.heldout=1.5"], "data.heldout = 1.5"),
        (["data.heldout=null"], "data.heldout_rows = 64 needs data.heldout"),
        (
            ["schedule.warmup_updates=61"],
            "schedule.warmup_updates = 61 is more than schedule.updates = 60",
        ),
        (["execution.pass_tokens=4096"], "execution.layout is literal"),
        (
            ["execution.layout=packed", "execution.pass_tokens=100"],
            "the longest row would fit in no pass",
        ),
        (["batch.accumulation=2", "batch.rows_per_update=8"], "say the same thing twice"),
        (["--hardware", "2x409"], "Did you mean 2x4090"),
        (["--hardware", "0x4090"], "0x4090 is not known"),
        (["--hardware"], "--hardware needs a name here"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
        (["--resume", "runs/x"], "leave the preset out"),
        (["oops"], "unrecognized arguments: oops"),
        (["run.name=../x"], "run.name = '../x'"),
        (
            ["memory.base=8gib"],
            "memory.base = '8gib': input should be 'auto', 'gpu', 'host' or 'sharded', "
            "or a whole number, or a size such as 12GiB",
        ),
        (["memory.base=-1"], "or a number of at least 0, or a size"),
        (["memory.host_gib=lots"], "memory.host_gib = 'lots': input should be 'auto', or a number"),
        (["memory.profile=0"], "memory.profile = '0': input should be 'min' or 'fill', or a num"),
    ],
)
def test_what_cannot_be_is_refused_with_name_value_and_cure(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(["r1_8b_scam", *words])
    assert said in str(refusal.value)
    assert "literal[" not in str(refusal.value), "a kind of value is no part of a field's name"


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean r1_8b_scam"):
        parse(["r1_8b_scm"])


def test_all_faults_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optimizer: {learning_rate: 3}\nfoo: 1\n")
    with pytest.raises(ConfigError) as refusal:
        parse(["--config", str(file)])
    assert "optimizer.learning_rate" in str(refusal.value)
    assert "foo is not a field" in str(refusal.value)


def test_none_is_a_word_where_a_field_has_it_and_null_is_no_value() -> None:
    config = parse(
        [
            "r1_8b_scam",
            "model.quantization=none",
            "record.text=none",
            "optimizer.max_grad_norm=null",
            "tracking.to=null",
        ]
    )
    assert (config.model.quantization, config.record.text) == ("none", "none")
    assert (config.optimizer.max_grad_norm, config.tracking.to) == (None, ())


def test_accumulation_on_the_command_line_replaces_the_presets_rows_per_update() -> None:
    batch = parse(["r1_8b_scam", "batch.accumulation=3"]).batch
    assert (batch.accumulation, batch.rows_per_update) == (3, None)


def test_every_field_says_what_it_is_and_every_peers_name_leads_to_a_field() -> None:
    fields = set(field_names())
    assert {name.split("=")[0] for name in PEER_NAMES.values()} <= fields

    def undocumented(model, prefix=""):
        for name, info in model.model_fields.items():
            if isinstance(info.annotation, type) and hasattr(info.annotation, "model_fields"):
                yield from undocumented(info.annotation, f"{prefix}{name}.")
            elif not info.description:
                yield prefix + name

    assert list(undocumented(Config)) == []


def test_print_config_prints_the_notebooks_curve(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse(["r1_8b_notebook", "--print_config"])
    assert done.value.code == 0
    assert "60: 1.327" in capsys.readouterr().out


def test_hardware_says_what_it_changed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(["r1_8b_scam", "--hardware"], cards_here=lambda: "2xt4")
    assert (config.execution.precision, config.execution.layout) == ("fp16", "literal")
    said = capsys.readouterr()
    assert said.err == "hardware  2xt4: batch.ranks None -> 2, execution.precision bf16 -> fp16\n"
    assert said.out == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    parse(["r1_8b_scam", "--hardware", "2x3090"])
    assert capsys.readouterr().err == ""


def test_hardware_knows_the_cards_that_a_plan_knows() -> None:
    from glassloop.predict.hardware import GPUS

    assert {gpu.key.lower(): gpu.has_bf16 for gpu in GPUS} == BF16


@pytest.mark.parametrize(
    "word",
    ["model.id=a\x1b]0;b\x07", "data.split=a\nb", "lora.targets=q_proj,\u202eb", "run.dir=a\tb"],
)
def test_no_name_or_path_holds_what_a_terminal_obeys(word: str) -> None:
    field = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{re.escape(field)}.* control character") as refusal:
        parse([word])
    assert "\x1b" not in str(refusal.value)
    assert parse(["data.system=two\nlines"]).data.system == "two\nlines"
