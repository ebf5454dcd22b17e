"""Norms through torch's kernel equal the model's; others are left."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from glassloop.engines.norms import fuse_norms


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_loss_and_gradient_of_a_whole_model_stay_the_same(model, request):
    folder = request.getfixturevalue(model)
    ids = torch.arange(3, 43).view(2, 20)
    results = []
    for fuse in (False, True):
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if fuse:
            assert fuse_norms(hf) == 2 * hf.config.num_hidden_layers + 1
        hf(ids, labels=ids).loss.backward()
        results.append((hf.model.embed_tokens.weight.grad, hf.lm_head.weight.grad))
    for own, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-7)


def norms(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    own, fused = LlamaRMSNorm(64), LlamaRMSNorm(64)
    with torch.no_grad():
        own.weight.copy_(torch.rand(64) + 0.5)
        fused.weight.copy_(own.weight)
    own, fused = own.to(dtype), fused.to(dtype)
    assert fuse_norms(fused) == 1
    return own, fused, (torch.randn(5, 64) * 3).to(dtype)


@pytest.mark.parametrize("precision", ["outside autocast", "under autocast"])
def test_in_bf16_it_keeps_the_dtype_and_is_at_least_as_close_to_the_truth(precision):
    own, fused, x = norms(torch.bfloat16)
    truth = (
        own.weight.double()
        * x.double()
        / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "under autocast"):
        ours, theirs = fused(x), own(x)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - truth).norm() <= (theirs.double() - truth).norm()


def test_another_dtype_than_the_weights_goes_the_models_own_way():
    own, fused, x = norms(torch.float32)
    assert torch.equal(fused(x.bfloat16()), own(x.bfloat16()))


def test_a_norm_that_adds_one_to_its_weight_is_left_alone():
    gemma = GemmaForCausalLM(
        GemmaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8)
    )  # fmt: skip
    assert fuse_norms(gemma) == 0
