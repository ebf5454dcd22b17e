"""The fused engine on one CUDA device.

Kernels are held to bits or to fp64 truth, gradients to fp32 truth, tiers to bits.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS, KEY_HEADS, SIZE = 8, 2, 128


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (14336, 14336), (4096,)])
def test_nf4_weights_have_bitsandbytes_bits(rows, nested):
    import bitsandbytes as bnb

    from glassloop.engines.fused.dequant import dequantise, pack

    torch.manual_seed(0)
    modules = []
    for height in rows:
        module = bnb.nn.Linear4bit(
            4096, height, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        weight = torch.randn(height, 4096, device="cuda", dtype=torch.bfloat16) * 0.02
        module.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
        ).to("cuda")
        modules.append(module)
    truth = torch.cat(
        [bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in modules]
    )
    packed = pack(modules, ["w"] * len(rows))
    right, below = (
        torch.randn(len(truth), 48, device="cuda").bfloat16(),
        torch.randn(48, 4096, device="cuda").bfloat16(),
    )
    out = torch.zeros(len(truth) + 48, 4096 + 48, device="cuda", dtype=torch.bfloat16)
    dequantise(packed, right, below, out)
    assert torch.equal(out[: len(truth), :4096], truth)
    assert torch.equal(out[: len(truth), 4096:], right) and torch.equal(
        out[len(truth) :, :4096], below
    )


@pytest.mark.parametrize(
    ("lengths", "kernel"),
    [
        ((300, 17, 1, 700), "triton"),
        ((300, 17, 1, 700), "flash"),
        ((1024, 1024), "cudnn"),
        ((1024, 1024), "triton"),
        ((96, 96), "triton"),
        ((96, 96), "flash"),
    ],
)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(HEADS, KEY_HEADS, SIZE), (6, 2, 64)])
def test_attention_and_its_gradient_before_rotation_are_near_fp64(
    lengths, kernel, heads, key_heads, size
):
    """Heads and gradients lie in one wide matrix, as in a layer."""
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import TILES
    from glassloop.engines.fused.rotary import angles

    if kernel != "flash" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("chosen and measured on Hopper alone")
    tokens, width = sum(lengths), (heads + 2 * key_heads) * size
    torch.manual_seed(0)
    wide = torch.randn(tokens, width, device="cuda").bfloat16()
    grad = torch.randn(tokens, heads, size, device="cuda").bfloat16()
    parts = wide.split([heads * size, key_heads * size, key_heads * size], dim=1)
    q, k, v = (t.unflatten(1, (-1, size)) for t in parts)
    by = angles(torch.arange(tokens, device="cuda"), torch.rand(size // 2, device="cuda"), 1.0)
    bounds = a.Bounds.for_kernel(kernel, lengths, wide.device, TILES[size])
    found = []
    for _ in range(2):
        kept = a.attention(q, k, v, bounds)
        found.append(
            (
                kept.out,
                a.attention_backward(grad, q, k, v, kept, bounds, by, room=48)[:, :width],
            )
        )
    if kernel == "triton":
        assert all(torch.equal(one, again) for one, again in zip(*found, strict=True))
    exact = [t.double() for t in (grad, q, k, v)]
    plain = a.Bounds.for_kernel("reference", lengths, wide.device)
    out = a.attention(*exact[1:], plain)
    truth = a.attention_backward(*exact, out, plain, by)
    assert found[0][0].shape == out.out.shape and off(found[0][0], out.out) < 8e-3
    widths = [t.shape[1] for t in parts]
    for one, slope in zip(
        found[0][1].split(widths, dim=1), truth.split(widths, dim=1), strict=True
    ):
        assert off(one, slope) < 8e-3


@pytest.mark.parametrize(
    ("lengths", "size", "kernel"),
    [
        ((300, 17), 128, "triton"),
        ((1024, 1024), 128, "cudnn"),
        ((1024, 1000), 64, "triton"),
        ((300, 17), 96, "flash"),
    ],
)
def test_attentions_kernel_is_chosen_by_card_lengths_and_head_size(lengths, size, kernel):
    from glassloop.engines.fused.attention import choose_kernel

    hopper = torch.cuda.get_device_capability()[0] == 9
    assert choose_kernel(lengths, torch.device("cuda"), torch.bfloat16, size) == (
        kernel if hopper else "flash"
    )
    torch.use_deterministic_algorithms(True)
    try:
        known = "flash" if size == 96 or not hopper else "triton"
        assert choose_kernel(lengths, torch.device("cuda"), torch.bfloat16, size) == known
    finally:
        torch.use_deterministic_algorithms(False)


def test_cross_entropy_is_near_fp64():
    from glassloop.engines.fused.loss import cross_entropy_

    torch.manual_seed(0)
    logits, labels = (
        (4 * torch.randn(300, 128256, device="cuda")).bfloat16(),
        torch.randint(128256, (300,), device="cuda"),
    )
    wide = logits.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    losses = torch.zeros(300, device="cuda")
    cross_entropy_(logits, labels, losses)
    assert off(losses, truth.detach()) < 1e-6 and off(logits, slope) < 4e-3


def gradient(run, u: int = 1) -> torch.Tensor:
    from train_loop import update_once

    outcome = update_once(run, u)
    assert outcome is not None and outcome.record.action == "applied"
    return run.replica.adapters.grad.double().clone()


def test_bf16_is_not_further_from_fp32_than_the_reference_engines_bf16(run_of):
    """By kind of layer within a fifth: a single window is noise."""
    grads = {}
    for name, how in {
        "truth": {"precision": "fp32"},
        "peft": {"precision": "bf16"},
        "fused": {"precision": "bf16", "engine": "fused"},
    }.items():
        run = run_of(execution=how, optimizer={"max_grad_norm": None})
        grads[name] = gradient(run)
    slices = run.replica.adapters.slices
    for kind in ("", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        names = [name for name in slices if kind in name]
        truth, peft, fused = (
            torch.cat([slices[n].of(grads[g]).flatten() for n in names])
            for g in ("truth", "peft", "fused")
        )
        assert off(fused, truth) <= 1.2 * off(peft, truth), (
            kind,
            off(fused, truth),
            off(peft, truth),
        )


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
@pytest.mark.parametrize("layout", ["literal", "packed"])
def test_fp32_gradient_is_the_reference_engines(run_of, request, layout, family):
    how = {
        "optimizer": {"max_grad_norm": None},
        "model": {"id": str(request.getfixturevalue(family))},
    }
    grads = [
        gradient(run_of(execution={"precision": "fp32", "engine": engine, "layout": layout}, **how))
        for engine in ("peft", "fused")
    ]
    assert off(grads[1], grads[0]) <= 1e-6


def test_tiers_agree_to_the_last_bit_in_deterministic_mode(run_of):
    from glassloop.predict.tiers import AWAY, Tiers

    grads = []
    for tiers in (
        Tiers(2),
        Tiers(2, held=1),
        Tiers(0),
        *(Tiers(kept, host) for kept in (1, 0) for host in AWAY),
    ):
        run = run_of(execution={"engine": "fused", "deterministic": True, "layout": "packed"})
        run.replica.plain_engine.use_tiers(tiers)
        grads.append(torch.cat([gradient(run, u) for u in (1, 2)]))
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grads[0], one) for one in grads[1:])


@pytest.mark.parametrize(
    ("lengths", "kernel"),
    [((300, 17, 1, 700), "flash"), ((1024, 1024), "cudnn"), ((2048,), "cudnn")],
)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(HEADS, KEY_HEADS, SIZE), (32, 16, 64)])
def test_groups_of_heads_have_attention_s_gradient(lengths, kernel, heads, key_heads, size):
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_groups import backward_by_groups, forward_by_groups
    from glassloop.engines.fused.rotary import angles

    if kernel == "cudnn" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("chosen and measured on Hopper alone")
    tokens, width = sum(lengths), (heads + 2 * key_heads) * size
    torch.manual_seed(0)
    wide = torch.randn(tokens, width, device="cuda").bfloat16()
    grad = torch.randn(tokens, heads, size, device="cuda").bfloat16()
    parts = wide.split([heads * size, key_heads * size, key_heads * size], dim=1)
    q, k, v = (t.unflatten(1, (-1, size)) for t in parts)
    by = angles(torch.arange(tokens, device="cuda"), torch.rand(size // 2, device="cuda"), 1.0)
    bounds = a.Bounds.for_kernel(kernel, lengths, wide.device)
    kept = a.attention(q, k, v, bounds)
    whole = a.attention_backward(grad, q, k, v, kept, bounds, by, room=48)[:, :width]
    by_groups = forward_by_groups(q, k, v, bounds)
    assert off(by_groups.out, kept.out) < 2e-3
    groups = backward_by_groups(grad, q, k, v, by_groups, bounds, by, room=48)[:, :width]
    assert off(groups, whole) < 2e-3


def test_a_pass_in_pieces_is_as_near_fp32_as_the_whole_one(run_of):
    """And has the same bits wherever its large tensors wait, in deterministic mode."""
    from glassloop.predict.tiers import HOSTS, Tiers

    how = {"optimizer": {"max_grad_norm": None}}
    truth = gradient(run_of(execution={"precision": "fp32"}, **how))
    grads = []
    for deterministic in (False, True):
        for tiers in (Tiers(1), *(Tiers(0, host, chunk=37) for host in HOSTS)):
            execution = {"engine": "fused", "deterministic": deterministic, "layout": "packed"}
            run = run_of(execution=execution, **how)
            run.replica.plain_engine.use_tiers(tiers)
            grads.append(gradient(run))
    torch.use_deterministic_algorithms(False)
    whole = off(grads[0], truth)
    assert all(off(one, truth) <= 1.2 * whole for one in grads)
    assert all(torch.equal(grads[6], one) for one in grads[7:])


def test_an_embedding_on_the_host_is_read_as_before_and_frees_its_memory(run_of):
    from glassloop.engines.fused.host import on_host

    weight = torch.randn(50_000, 512, device="cuda").bfloat16()
    before, ids = torch.cuda.memory_allocated(), torch.tensor([0, 7, 49_999], device="cuda")
    rows = torch.nn.functional.embedding(ids, weight)
    weight.data = on_host(weight.data)
    assert torch.cuda.memory_allocated() < before - 40 * 2**20
    assert weight.is_cuda and torch.equal(torch.nn.functional.embedding(ids, weight), rows)
    run = run_of(execution={"engine": "fused"}, memory={"profile": "min"})
    assert (run.tiers["kept"], run.tiers["host"]) == (1, "all")
    assert torch.isfinite(gradient(run)).all()
    with torch.no_grad():
        run.replica.plain_engine.hf(
            input_ids=ids.unsqueeze(0) % 500
        )  # the model over the same storage


def test_passes_of_many_lengths_leave_no_memory_reserved_in_vain():
    from glassloop.loop.launch import grow_segments

    grow_segments()
    torch.cuda.empty_cache()
    before, held = torch.cuda.memory_reserved(), []
    torch.cuda.reset_peak_memory_stats()
    for step in range(
        24
    ):  # as layers of a pass do: many blocks, larger and smaller from pass to pass
        size = (96 + 37 * step % 64) * 2**18
        held = [
            torch.empty(size * part, dtype=torch.uint8, device="cuda") for part in (1, 3, 2, 7) * 6
        ]
        held.clear()
    assert torch.cuda.max_memory_reserved() - before < 1.15 * (
        torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    )


def test_a_run_learns_as_the_reference_engine_does(run_of):
    from train_loop import update_once

    losses = {}
    for engine in ("peft", "fused"):
        run = run_of(execution={"engine": engine})
        outcomes = (update_once(run, u) for u in range(1, 41))
        losses[engine] = [one.record.loss_nats for one in outcomes]  # type: ignore[union-attr]
    learned = losses["peft"][0] - losses["peft"][-1]
    assert learned > 1
    assert abs(sum(losses["fused"][-5:]) - sum(losses["peft"][-5:])) / 5 < 0.05 * learned
