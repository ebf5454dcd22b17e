"""Full disks and missing logins, as doctor finds them."""

from __future__ import annotations

import os

from findings import levels

from glassloop.config.arguments import parse
from glassloop.doctor import checks as doctor
from glassloop.doctor.findings import NOTE, OK, PROBLEM


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
