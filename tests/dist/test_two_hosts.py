"""Two hosts train one run, and end when the network between them is cut.

Each host is a network namespace with an address, a name and a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
import yaml
from launching import HERE, LAUNCH, ROOT, environment, write_rows

from glassloop.loop.watchdog import GROUP_S

HOSTS = (f"glass{os.getpid()}a", f"glass{os.getpid()}b")  # two test runs on one machine do not meet
ADDRESSES = ("10.77.31.1", "10.77.31.2")
TIMEOUT_S = 12  # execution.collective_timeout_s


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Both namespaces, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip")
    try:
        made = all(ip("netns", "add", host) for host in HOSTS)
        made = made and ip(
            "link",
            "add",
            "glass0",
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            "glass1",
            "netns",
            HOSTS[1],
        )
        for number, host in enumerate(HOSTS):
            made = made and ip(
                "-n", host, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"glass{number}"
            )
            made = (
                made
                and ip("-n", host, "link", "set", "lo", "up")
                and ip("-n", host, "link", "set", f"glass{number}", "up")
            )
        if not made:
            pytest.skip("network namespaces are not permitted here")
        yield
    finally:
        for host in HOSTS:
            ip("netns", "del", host)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("hosts")
    rows = write_rows(folder / "rows.jsonl", 37)
    config = yaml.safe_load((ROOT / "accelerate_configs/multi_node.yaml").read_text())
    (folder / "cpu.yaml").write_text(
        yaml.safe_dump({**config, "use_cpu": True, "gpu_ids": "-1,-1"})
    )
    return [
        str(folder / "cpu.yaml"), f"model.id={tiny_llama}", f"data.source={rows}",
        "data.template=chat", "data.max_tokens=96", "lora.r=4", "batch.size=1",
        "batch.accumulation=2", "execution.precision=fp32", "evaluation.samples=0",
        "checkpoint.every_updates=5", f"execution.collective_timeout_s={TIMEOUT_S}",
    ]  # fmt: skip


def start(
    words: list[str], number: int, port: int, folder: Path, *more: str
) -> subprocess.Popen[str]:
    """The launch of one host, as a user types it there."""
    config, *fields = words
    place = ["--num_machines", "2", "--machine_rank", str(number)]
    place += ["--main_process_ip", ADDRESSES[0], "--main_process_port", str(port)]
    apart = [sys.executable, str(HERE / "on_host.py"), HOSTS[number], *LAUNCH[2:]]
    script = [str(ROOT / "train_loop.py"), *fields, f"run.dir={folder / HOSTS[number]}", *more]
    env = environment(GLOO_SOCKET_IFNAME=f"glass{number}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return launching.start([*apart, config, *place, *script], env=env, **pipes)


def test_two_hosts_train_one_run(hosts: None, words: list[str], tmp_path: Path) -> None:
    both = [
        start(words, number, 29511, tmp_path, "run.name=both", "schedule.updates=8")
        for number in (0, 1)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    records = [
        json.loads(line)
        for line in (tmp_path / HOSTS[0] / "both/metrics.jsonl").read_text().splitlines()
    ]
    assert [record["update"] for record in records] == list(range(1, 9))
    assert all(len(record["rank_loss_nats"]) == 2 for record in records)
    assert "1 row x 2 ranks x 2 micro-batches = 4 rows an update" in outputs[0]
    assert not (
        tmp_path / HOSTS[1] / "both/metrics.jsonl"
    ).exists()  # rank 0's host keeps the record


@pytest.mark.thorough
def test_hosts_that_are_cut_off_end_and_say_so(
    hosts: None, words: list[str], tmp_path: Path
) -> None:
    both = [
        start(words, number, 29512, tmp_path, "run.name=cut", "schedule.updates=4000")
        for number in (0, 1)
    ]
    metrics = tmp_path / HOSTS[0] / "cut/metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 8):
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in both
            ), "the run did not get there"
            time.sleep(0.1)
        assert ip("-n", HOSTS[1], "link", "set", "glass1", "down")
        cut = time.monotonic()
        outputs = [process.communicate(timeout=120)[0] for process in both]
        took_s = time.monotonic() - cut
    finally:
        for process in both:
            process.kill()
    assert all(process.returncode != 0 for process in both)
    for rank, output in enumerate(outputs):
        assert (
            f"rank {rank} could not hear from the others" in output
            or f"rank {rank} has waited" in output
        ), output[-3000:]
        assert "Go on from the last checkpoint with --resume" in output
    # In a checkpoint the process group notices it, which waits GROUP_S longer than the watchdog.
    assert took_s < TIMEOUT_S + GROUP_S + 20
    saved = sorted(path.name for path in (tmp_path / HOSTS[0] / "cut/checkpoints").glob("update_*"))
    assert saved and all(
        int(name[-6:]) % 5 == 0 for name in saved
    )  # nothing was saved on the way out
