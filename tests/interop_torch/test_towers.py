"""A tower of CLIP by itself: its files lack the names that it has beside the other."""

import numpy as np
import pytest
import torch
import transformers as t
from figures import convert
from models import DECODER, VISION, Model, inputs, perturbed

from prenorm_jax.interop.torch_norms import swap_norms

TOWERS = {
    "text": Model(t.CLIPTextModel, t.CLIPTextConfig, {**DECODER, "projection_dim": 6}),
    "vision": Model(t.CLIPVisionModel, t.CLIPVisionConfig, {**VISION, "projection_dim": 6}, "images"),
}


def pooled(tower, model):
    with torch.no_grad():
        return model(**inputs(tower, torch.float64)).pooler_output.numpy()


@pytest.mark.parametrize("fold", [False, True], ids=["", "fold"])
@pytest.mark.parametrize("name", TOWERS)
def test_it_is_the_same_function(name, fold, tmp_path):
    tower = TOWERS[name]
    before = perturbed(tower, torch.float64)
    before.save_pretrained(tmp_path / "source")
    manifest = convert(tmp_path / "source", tmp_path / "destination", fold=fold)
    after, report = tower.kind.from_pretrained(tmp_path / "destination", dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    oracle = pooled(tower, before)
    np.testing.assert_allclose(pooled(tower, after.eval()), oracle, atol=1e-10 * np.abs(oracle).max())
    swap_norms(after, manifest)
    np.testing.assert_allclose(pooled(tower, after), oracle, atol=1e-10 * np.abs(oracle).max())
    swap_norms(before, manifest)
    assert np.abs(pooled(tower, before) - oracle).max() > 1e-3
