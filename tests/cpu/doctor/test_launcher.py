"""A launcher's file and variables, as doctor reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from findings import only

from glassloop.config.arguments import parse
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
from glassloop.doctor.launch_files import check_launcher, default_config_file

ROOT = Path(__file__).resolve().parents[3]


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
