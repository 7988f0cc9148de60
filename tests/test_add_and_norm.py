"""A norm behind an addition: its values and all its gradients are those of the two, one after the other."""

import functools

import jax
import numpy as np
import pytest

from prenorm_jax import norms

KINDS = {
    "layer": norms.layer,
    "rms": norms.rms,
    "crms": norms.crms,
    "packed": norms.packed,
    "packed drop": functools.partial(norms.packed, basis="drop"),
}
GIVEN = {"nothing": (0, 0), "a branch": (1, 0), "a branch and its bias": (1, 1)}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("affine", [False, True])
def test_it_is_the_addition_and_the_norm(name, given, affine):
    rng = np.random.default_rng(0)
    x, y, dx, dn = (rng.normal(size=(5, 6)) + 0.3 for _ in range(4))
    written, scale, bias = (rng.normal(size=6) for _ in range(3))
    kind = KINDS[name](6, 1e-3)
    leaves = [leaf if wanted else None for leaf, wanted in zip((y, written), GIVEN[given], strict=True)]
    leaves += [scale, bias] if affine else [None, None]

    def plain(x, y, written, scale, bias):
        x = x if y is None else x + (y if written is None else y + written[None])
        return x, norms.norm(x, scale, bias, kind)

    wanted, plain_pull_back = jax.vjp(plain, x, *leaves)
    found, pull_back = jax.vjp(lambda *leaves: norms.add_and_norm(*leaves, kind), x, *leaves)
    pairs = zip(
        jax.tree.leaves((found, pull_back((dx, dn)))), jax.tree.leaves((wanted, plain_pull_back((dx, dn)))), strict=True
    )
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    # The check can fail: without the main branch's own gradient it does.
    assert np.abs(pull_back((0 * dx, dn))[0] - plain_pull_back((dx, dn))[0]).max() > 1e-3
