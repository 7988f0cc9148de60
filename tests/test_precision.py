"""Slices give what the whole gives, bit by bit; one rounding is one rounding, also to bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import precision


def acts_along(axis):
    def change(kernel, bias, row):
        read = (kernel * row).sum(axis, keepdims=True)
        shorter = np.delete(kernel, -1, axis) if isinstance(kernel, np.ndarray) else jnp.delete(kernel, -1, axis)
        return shorter, read if bias is None else bias + read, None

    return change


@pytest.mark.parametrize("slice_size", [1, 5, 7, 24, 10**9])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4, 5), -2), ((3, 4, 5), -3), ((3, 4, 5), -1), ((6,), -1), ((0, 3), -1)]
)
def test_slices_give_what_the_whole_gives(shape, axis, slice_size, monkeypatch, assert_same):
    monkeypatch.setattr(precision, "SLICE", slice_size)
    rng = np.random.default_rng(0)
    along = [n if k - len(shape) == axis else 1 for k, n in enumerate(shape)]
    others = [1 if k - len(shape) == axis else n for k, n in enumerate(shape)]
    kernel, bias, row = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, others, along))
    for given in (bias, None):
        whole = acts_along(axis)(*(None if a is None else np.asarray(a, np.float64) for a in (kernel, given, row)))
        found = precision.in_slices(acts_along(axis), [kernel, given, row], [kernel, bias, bias], axis)
        assert found[2] is None
        assert_same(found[:2], [jnp.asarray(value, jnp.float32) for value in whole[:2]])
        traced = jax.jit(lambda k, b, r: precision.in_slices(acts_along(axis), [k, b, r], [k, bias, bias], axis))
        assert_same(traced(kernel, given, row)[:2], found[:2], 1e-6)


def test_every_entry_is_in_one_slice_and_none_is_larger(monkeypatch):
    monkeypatch.setattr(precision, "SLICE", 10)
    for shape, axis in [((7, 3, 5), -2), ((7, 3, 5), -3), ((1, 40), -2), ((2, 2, 2, 2, 3), -1)]:
        seen = np.zeros(shape, int)
        for index in precision._slices(shape, axis):
            seen[index] += 1
            assert seen[index].size <= max(10, shape[axis])
        assert np.all(seen == 1)


def test_one_rounding_to_bfloat16():
    """Against the exact neighbours: values at, just above and just below half-way, of all exponents, and the special ones."""
    rng = np.random.default_rng(0)
    near = rng.normal(size=1000).astype(jnp.bfloat16).astype(np.float32)
    above = (near.view(np.uint32) + 0x10000).view(np.float32).astype(np.float64)
    half = (near.astype(np.float64) + above) / 2
    even = np.where((near.view(np.uint32) >> 16) % 2 == 0, near, above)
    for value, expected in [(half * (1 + 1e-13), above), (half * (1 - 1e-13), near), (half, even)]:
        assert np.array_equal(precision.rounded(value, jnp.bfloat16).astype(np.float64), expected)
    twice = (half * (1 + 1e-13)).astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    assert not np.array_equal(twice, above)  # what two roundings give
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-320, 1e300, -1e300])
    expected = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 0.0, np.inf, -np.inf])
    np.testing.assert_array_equal(precision.rounded(special, jnp.bfloat16).astype(np.float64), expected)


def test_arrays_stay_what_and_where_they_were():
    device = jax.devices()[3]
    leaf = jax.device_put(jnp.ones((2, 3)), device)
    assert precision.in_slices(lambda x: (x,), [leaf], [leaf], -1)[0].devices() == {device}
    assert isinstance(precision.in_slices(lambda x: (x,), [np.ones((2, 3))], [np.ones(1)], -1)[0], np.ndarray)
