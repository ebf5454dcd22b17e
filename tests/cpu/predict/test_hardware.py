"""Facts about GPUs by name, and none for unknown names."""

import pytest

from glassloop.predict.hardware import (
    GPUS,
    PLANNED_FOR,
    Present,
    card_here,
    gpu_named,
    gpus_present,
    parse_smi,
)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("h100", "H100"),
    ],
)
def test_a_card_is_found_by_the_name_that_torch_gives(name, key):
    found = gpu_named(name)
    assert found is not None and found.key == key


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100",
        "A100",
        "NVIDIA B200",
        "cpu",
        "",
    ],
)
def test_a_name_that_is_not_in_the_table_is_no_other_card(name):
    assert gpu_named(name) is None


def test_names_are_unique_and_numbers_are_sane():
    names = [
        name.lower()
        for gpu in GPUS
        for name in {gpu.key.lower(), *(known.lower() for known in gpu.names)}
    ]
    assert len(names) == len(set(names))
    for gpu in GPUS:
        assert 10 < gpu.usable_gib < 200 and 0.2 < gpu.bandwidth_tbs < 10
        assert (gpu.bf16_tflops is not None) == gpu.has_bf16
    assert all(gpu_named(key) for key in PLANNED_FOR)


def test_nvidia_smis_answer_is_read_and_odd_lines_are_passed_over():
    answer = (
        "NVIDIA H200, 143771, 143160, 580.82.07, 9.0\nOld Card, 4096, 4000, 390.1, "
        "[N/A]\nGarbage\nA, [N/A], 3, x, 8.0\n"
    )
    new, old = parse_smi(answer)
    assert (new.name, new.driver, new.capability) == ("NVIDIA H200", "580.82.07", (9, 0))
    assert new.free_gib == pytest.approx(143160 / 1024) and new.gpu is gpu_named("H200")
    assert old.capability is None and old.gpu is None


def test_a_machine_without_nvidia_smi_has_no_cards(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_present() == ()


def test_the_card_here_is_named_as_hardware_takes_it() -> None:
    def cards(*names: str) -> tuple[Present, ...]:
        return tuple(Present(name, 24.0, 23.0, "570", (8, 6)) for name in names)

    assert card_here(()) == "cpu"
    assert card_here(cards("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090")) == "3090"
    for odd in (("GeForce RTX 3090", "GeForce RTX 4090"), ("A card to come",)):
        with pytest.raises(ValueError, match=odd[0]):
            card_here(cards(*odd))
