"""A plan counts a layer of every family as the engine does."""

from __future__ import annotations

import importlib.util

import pytest
from family_models import MODELS, fused_of

from glassloop.plan.families import FAMILIES as DESCRIBED
from glassloop.predict.shapes import shapes_from_config
from glassloop.predict.tiers import sizes_of
from glassloop.predict.traits import FAMILIES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


def test_a_plan_knows_the_families_that_fused_supports():
    assert set(FAMILIES) == set(DESCRIBED)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_a_layer_and_weights_are_the_model_s(model_of, name):
    reference, _ = model_of(name)
    base = reference.hf.get_base_model()
    shapes = shapes_from_config(base.config.to_dict(), name)
    assert shapes is not None
    layer = fused_of(reference).layers[0]
    assert layer.sizes == sizes_of(shapes, 3, shapes.apart(tuple(shapes.linear_layers)), element=4)
    trained = sum(p.numel() for p in reference.hf.parameters() if p.requires_grad)
    assert shapes.trainable(lambda _: 3, ("all-linear",)) == trained
    decoder = base.get_decoder()
    norms = sum(p.numel() for path, p in decoder.named_parameters() if "norm" in path)
    assert shapes.norm_weights == norms
