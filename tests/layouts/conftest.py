"""What every layout has to show, on a model built in the test with leaves named as the public one names them: the tree that the layout
converts is the same function in float64 with RMSNorm in the place of each LayerNorm that the layout names, at the eps it names, and of
no other; and the untransformed weights are not."""

import numpy as np
import pytest

import prenorm_jax as pn
from prenorm_jax.paths import leaves, with_leaves

EXACT = 1e-10
DIFFERENT = 1e-3


def _randomized(params, seed=0):
    """The tree with float64 leaves that hide nothing: all have a mean, and gammas have a zero and a negative entry."""
    rng = np.random.default_rng(seed)
    flat = leaves(params)
    for path, leaf in flat.items():
        value = rng.normal(size=leaf.shape) * (0.6 if len(leaf.shape) > 1 else 1) + 0.3
        if path.endswith("/scale"):
            value[..., :2] = 0.0, -0.7
        flat[path] = value
    return with_leaves(params, flat)


def _missed(actual, expected):
    return np.max(np.abs(np.asarray(actual) - np.asarray(expected))) / np.max(np.abs(np.asarray(expected)))


def _check_layout(spec, params, run, keeps=0):
    """Args: run(params, norms): the model, with RMSNorm of the given eps in the modules that `norms` names, (module, eps), and LayerNorm
    elsewhere; keeps: how many norms keep their affine."""
    resolved = spec.resolve(params)
    norms = {norm.name.rsplit("/", 1)[0]: norm.eps for norm in resolved.norms}
    assert all(norms.values())
    assert sum(norm.keep is not None for norm in resolved.norms) == keeps
    expected = run(params, {})
    assert _missed(run(pn.to_pre_rmsnorm(params, spec), norms), expected) <= EXACT
    there_and_back = pn.decompress(pn.compress(params, spec), spec)
    assert _missed(run(there_and_back, norms), expected) <= EXACT
    assert _missed(run(pn.fold_affine(params, spec), norms), expected) >= DIFFERENT  # writers with a mean
    assert _missed(run(pn.recenter(params, spec), {}), expected) <= EXACT  # what LayerNorm does not see
    other_eps = {name: eps + 1e-3 for name, eps in norms.items()}
    assert _missed(run(pn.to_pre_rmsnorm(params, spec), other_eps), expected) >= 100 * EXACT


@pytest.fixture
def randomized():
    return _randomized


@pytest.fixture
def check_layout():
    return _check_layout
