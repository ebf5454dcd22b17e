"""What is installed.

Every package listed, every requirement pinned within its range, launch files without training
knobs.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
LAUNCH_FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
# How many ranks, and on what. Everything else in a launch file would be a second place that decides
# about training.
LAUNCH_KEYS = {
    "compute_environment",
    "distributed_type",
    "use_cpu",
    "gpu_ids",
    "num_machines",
    "machine_rank",
    "num_processes",
    "main_process_port",
    "mixed_precision",
}
HOST_KEYS = {"main_process_ip", "rdzv_backend", "same_network"}  # how several hosts find each other


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements() -> list[Requirement]:
    """Everything that setup.cfg asks for, extras included."""
    parser = setup_cfg()
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.splitlines() if line]


def pins() -> dict[str, str]:
    """Versions of constraints.txt by normalised name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(lines), re.M)
    }


def test_every_package_is_listed_for_the_wheel() -> None:
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "glassloop").rglob("__init__.py")
    }
    assert set(setup_cfg()["options"]["packages"].split()) == on_disk


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_pinned_version_lies_in_the_range_that_is_asked(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name == "unsloth":
        assert name not in pins(), (
            "unsloth caps transformers below the pin: it is installed without constraints"
        )
        return
    assert name in pins(), f"constraints.txt has no line for {requirement.name}"
    assert requirement.specifier.contains(pins()[name]), (
        f"{requirement} against {pins()[name]} in constraints.txt"
    )


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_a_launch_file_holds_no_training_knob(path: Path) -> None:
    launch = yaml.safe_load(path.read_text(encoding="utf-8"))
    hosts = launch["num_machines"] > 1
    assert set(launch) == LAUNCH_KEYS | (HOST_KEYS if hosts else set())
    assert launch["mixed_precision"] == "no", "execution.precision decides"
    assert launch["distributed_type"] == "MULTI_GPU", (
        "other types start one process, or none that a signal reaches"
    )
    assert hosts or launch["main_process_port"] == 0, "two runs on one machine must not meet"


def test_there_is_one_launch_file_for_each_way_to_run() -> None:
    ways = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in LAUNCH_FILES}
    assert {name: (way["num_processes"], way["use_cpu"]) for name, way in ways.items()} == {
        "single_gpu": (1, False),
        "ddp_2gpu": (2, False),
        "cpu_2proc": (2, True),
        "multi_node": (2, False),
    }
