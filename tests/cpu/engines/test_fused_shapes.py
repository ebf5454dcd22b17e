"""The fused engine's gradient if groups of a layer have equal shapes.

Also over ranks and targets that differ by group.
"""

from __future__ import annotations

import importlib.util
import random

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# (hidden, intermediate, heads, key heads, head size); NF4 asks for inputs in multiples of 64
EQUAL = {
    "o and down": (64, 128, 4, 1, 32),
    "qkv and gate_up": (128, 128, 4, 2, 32),
    "qkv and down": (128, 128, 4, 2, 16),
    "o and gate_up": (128, 64, 4, 2, 32),
    "o and down, qkv and gate_up": (64, 128, 4, 2, 32),
}
SHAPES = [*EQUAL.values(), (64, 192, 2, 1, 32), (192, 64, 2, 2, 64)]


def groups_of(shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """(N, K) of each group of a layer."""
    hidden, intermediate, heads, key_heads, size = shape
    return {
        "qkv": ((heads + 2 * key_heads) * size, hidden),
        "o": (hidden, heads * size),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }


def saved_model(folder, tokenizer, shape: tuple[int, ...], *, tied: bool):
    hidden, intermediate, heads, key_heads, size = shape
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=size,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(sum(shape))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_of(tmp_path_factory, tiny_tokenizer, engine_of):
    """A quantised base of a shape, without adapters; made once for each."""
    made = {}

    def build(shape: tuple[int, ...], *, tied: bool):
        if (shape, tied) not in made:
            folder = saved_model(
                tmp_path_factory.mktemp("shaped"), tiny_tokenizer, shape, tied=tied
            )
            engine = engine_of(folder, quantization="nf4")
            made[shape, tied] = engine, engine.hf.unload()
        return made[shape, tied]

    return build


def gradient(engine, adapters: FlatAdapters, p) -> tuple[float, torch.Tensor]:
    adapters.zero_grad()
    loss_sum, _ = engine(p)
    (loss_sum / 7).backward()
    return loss_sum.item(), adapters.grad.clone()


def check_gradients(
    base_of, shape, *, tied=False, r=4, patterns=None, targets=TARGETS, lengths=(9, 17), packed=True
) -> None:
    """Compare sums and each matrix's gradient with transformers and PEFT.

    Both lie over the same storage. The first of `lengths` is at least 6: a label that attention
    reaches through one key alone leaves q and k without a gradient.
    """
    from glassloop.engines.fused.engine import FusedEngine

    engine, base = base_of(shape, tied=tied)
    lora = peft.LoraConfig(
        r=r,
        lora_alpha=8,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        rank_pattern=patterns or {},
    )
    engine.hf = peft.get_peft_model(base, lora)
    try:
        adapters = FlatAdapters(engine.hf.named_parameters())
        torch.manual_seed(3)
        adapters.flat.data.copy_(torch.randn_like(adapters.flat) * 0.05)
        generator = random.Random(0)
        rows = [
            Row(
                f"r{i}",
                tuple(generator.randrange(5, 500) for _ in range(n)),
                tuple(place >= n // 2 for place in range(n)),
            )
            for i, n in enumerate(lengths)
        ]
        p = build_pass(rows, packed=packed, pad_id=0, device=torch.device("cpu"))
        wanted, slope = gradient(engine, adapters, p)
        found, ours = gradient(FusedEngine(engine.hf, engine.report), adapters, p)
        assert found == pytest.approx(wanted, rel=1e-6)
        for name, place in adapters.slices.items():
            far = float((place.of(ours) - place.of(slope)).norm())
            assert far <= 1e-5 * float(place.of(slope).norm()), f"{name}: off by {far:g}"
    finally:
        engine.hf.unload()


@pytest.mark.parametrize("pair", EQUAL)
@pytest.mark.parametrize("r", [4, 16])
def test_groups_of_one_layer_keep_their_own_gradients_when_their_shapes_agree(base_of, pair, r):
    groups = groups_of(EQUAL[pair])
    for both in pair.split(", "):
        one, other = both.split(" and ")
        assert groups[one] == groups[other]
    check_gradients(base_of, EQUAL[pair], r=r)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_ranks_and_targets_give_the_reference_engines_gradient(base_of, shape, data):
    targets = data.draw(st.lists(st.sampled_from(TARGETS), min_size=1, unique=True), "targets")
    patterns = data.draw(
        st.dictionaries(st.sampled_from(targets), st.sampled_from([1, 3, 8, 16, 20]), max_size=3),
        "ranks",
    )
    check_gradients(
        base_of,
        shape,
        tied=data.draw(st.booleans(), "tied"),
        r=data.draw(st.sampled_from([1, 4, 16]), "r"),
        patterns=patterns,
        targets=targets,
        lengths=(
            data.draw(st.integers(6, 20), "first"),
            *data.draw(st.lists(st.integers(1, 20), max_size=2), "others"),
        ),
        packed=data.draw(st.booleans(), "packed"),
    )


@pytest.mark.parametrize("pair", EQUAL)
def test_a_layer_without_adapters_and_one_that_misses_some(base_of, pair):
    """By a pattern over whole names, as PEFT's configs may have it."""
    shape = EQUAL[pair]
    check_gradients(base_of, shape, targets=("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"))
    check_gradients(
        base_of,
        shape,
        targets=("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"),
    )


def test_room_for_gradients_is_counted_by_group(base_of):
    from glassloop.engines.fused.building import build_layer
    from glassloop.plan.support import description_of, fields_of
    from glassloop.predict.tiers import product_bytes

    _, base = base_of(EQUAL["o and down"], tied=False)
    one = build_layer(
        base.model.layers[0], description_of(fields_of(base.config)), torch.float32, 0
    ).sizes
    assert one.o == one.down
    assert product_bytes(one) == sum(
        4 * g.rank * (g.rows + g.columns) for g in (one.qkv, one.o, one.gate_up, one.down)
    )
