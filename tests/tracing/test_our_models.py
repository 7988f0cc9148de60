"""Our own ViT and GPT: tracing looks inside their norms' derivative rules and through their barriers, and finds what we ship."""

import jax
import numpy as np
import pytest

import prenorm_jax as pn
from prenorm_jax import models

SHAPE = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "dtype": "float64", "param_dtype": "float64"}
CONFIGS = {
    "vit": models.ViTConfig(**SHAPE, image_size=8, patch_size=4, classes=5),
    "gpt, stacked, tied": models.GPTConfig(**SHAPE, context=6, vocab_size=11, vocab_multiple=8, scan_layers=True),
}
LAYOUTS = {"vit": pn.layouts.VIT, "gpt, stacked, tied": pn.layouts.GPT_TIED}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_norm_of_our_models_is_converted(name, random_params):
    config = CONFIGS[name]
    params = random_params(config)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 8, 8, 3)) if name == "vit" else rng.integers(0, 11, size=(2, 6))

    def fn(params, inputs):
        return models.apply(config, params, inputs)[0]

    out = pn.convert(fn, params, inputs)
    assert all(site.converted for site in out.report.sites)
    assert len(out.report.activations) == (name != "vit")  # what the tied table looks up
    found, shipped = (b.resolve(params) for b in (pn.trace(fn, params, inputs), LAYOUTS[name]))
    assert set(found.writers) == set(shipped.writers)
    assert {(n.scale, n.readers) for n in found.norms} == {(n.scale, n.readers) for n in shipped.norms}
    expected, found = jax.jit(fn)(params, inputs), jax.jit(out.fn)(out.params, inputs)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-10 * scale
    # The control: the rewritten program on the parameters as they were is another function.
    assert np.abs(jax.jit(out.fn)(params, inputs) - expected).max() >= 1e-3 * scale
