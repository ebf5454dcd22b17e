"""What a host has to spare: the system's word, and every cgroup's."""

from __future__ import annotations

from pathlib import Path

import pytest

from glassloop.predict.host import GIB, available_bytes, cgroup_bytes, host_ledger, spare_bytes


def machine(root: Path, available_gib: float, cgroup: str = "", **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {int(available_gib * 2**20)} kB\n"
    )
    if cgroup:
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_name(file.name.replace("-", ".")).write_text(text)
    return root


def test_a_tenth_or_two_gib_are_left_to_others(tmp_path):
    assert spare_bytes(machine(tmp_path / "a", 100)) == 90 * GIB
    assert spare_bytes(machine(tmp_path / "b", 8)) == 6 * GIB
    assert spare_bytes(machine(tmp_path / "c", 1.5)) == 0


def test_every_cgroup_above_the_process_counts_and_page_cache_is_free(tmp_path):
    root = machine(
        tmp_path,
        100,
        "0::/pod/box\n",
        **{
            "memory-max": "max\n",  # a root group has no limit
            "pod__memory-max": f"{40 * GIB}\n",
            "pod__memory-current": f"{30 * GIB}\n",
            "pod__memory-stat": f"anon 5\nactive_file {4 * GIB}\ninactive_file {6 * GIB}\n",
            "pod__box__memory-max": f"{30 * GIB}\n",
            "pod__box__memory-current": f"{5 * GIB}\n",
        },
    )
    assert list(cgroup_bytes(root)) == [20 * GIB, 25 * GIB]
    assert spare_bytes(root) == 18 * GIB


def test_a_container_that_sees_its_group_at_the_top_is_read_there(tmp_path):
    files = {"memory-max": str(16 * GIB), "memory-current": str(GIB)}
    root = machine(tmp_path, 100, "0::/docker/of-the-host\n", **files)
    assert list(cgroup_bytes(root)) == [15 * GIB]


def test_version_1_says_no_limit_by_a_large_number(tmp_path):
    root = machine(
        tmp_path,
        100,
        "12:cpu,cpuacct:/x\n5:memory:/x\n1:name=systemd:/\n",
        **{
            "memory__memory-limit_in_bytes": str(2**63 - 4096),
            "memory__memory-usage_in_bytes": str(50 * GIB),
            "memory__x__memory-limit_in_bytes": str(10 * GIB),
            "memory__x__memory-usage_in_bytes": str(9 * GIB),
            "memory__x__memory-stat": f"inactive_file 7\ntotal_inactive_file {5 * GIB}\n",
        },
    )
    assert list(cgroup_bytes(root)) == [6 * GIB]


def test_a_group_over_its_limit_has_nothing_to_spare(tmp_path):
    files = {"memory-max": str(GIB), "memory-current": str(2 * GIB)}
    assert spare_bytes(machine(tmp_path, 100, "0::/\n", **files)) == 0


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: x kB"])
def test_a_system_that_does_not_say_is_told_to_name_a_number(tmp_path, text):
    (tmp_path / "proc").mkdir()
    if text:
        (tmp_path / "proc/meminfo").write_text(text)
    with pytest.raises(ValueError, match=r"memory\.host_gib = auto.*set memory\.host_gib"):
        available_bytes(tmp_path)


def test_this_machine_says():
    assert 0 <= spare_bytes() <= available_bytes()


def test_the_ledger_names_what_is_there_alone():
    ledger = host_ledger(GIB, 25 * GIB + GIB // 5, 0)
    assert ledger.total_bytes == 26 * GIB + GIB // 5
    assert ledger.describe() == "26.2 GiB of host memory locked: activations 25.2, embedding 1.0"
    assert host_ledger(0, 0, 0).total_bytes == 0
