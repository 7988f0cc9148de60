"""The norms against the formulas of their docstrings in float64, their gradients against autodiff and finite differences, what they
keep for the backward pass, the dtype of their statistics, and the spare lane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from prenorm_jax import crms_norm, crms_norm_packed, layer_norm, rms_norm

NORMS = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "crms_norm reflect": crms_norm,
    "crms_norm drop": functools.partial(crms_norm, basis="drop"),
    "crms_norm_packed reflect": crms_norm_packed,
    "crms_norm_packed drop": functools.partial(crms_norm_packed, basis="drop"),
}
EPS = 1e-3  # large enough that a misplaced eps shows
EXACT = 1e-13  # float64 with tens of operations on values near 1

every_norm = pytest.mark.parametrize("name", NORMS)
every_affine = pytest.mark.parametrize(
    "affine", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["none", "bias", "scale", "both"]
)


def formula(name, x, scale=None, bias=None, eps=EPS, xp=np):
    """The norm as one would write it down, without regard to speed."""
    live = x[..., :-1] if "packed" in name else x
    d = x.shape[-1] + (name.split()[0] == "crms_norm")
    if name == "layer_norm":
        live = live - live.mean(-1, keepdims=True)
    power = (live * live).sum(-1, keepdims=True)
    if name.endswith("drop"):
        power = power + live.sum(-1, keepdims=True) ** 2
    n = live / xp.sqrt(power / d + eps)
    if "packed" in name:
        n = xp.concatenate([n, xp.zeros_like(x[..., :1])], -1)
    n = n if scale is None else n * scale[None, None]
    n = n if bias is None else n + bias[None, None]
    return xp.concatenate([n[..., :-1], xp.ones_like(x[..., :1])], -1) if "packed" in name else n


def arrays(affine=(1, 1), shape=(3, 4, 7), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + 0.5
    scale, bias = (rng.normal(size=shape[-1:]) if given else None for given in affine)
    return x, scale, bias


@every_norm
@every_affine
def test_value_is_the_formula(name, affine):
    x, scale, bias = arrays(affine)
    y = jax.jit(functools.partial(NORMS[name], eps=EPS))(x, scale, bias)
    expected = formula(name, x, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=0, atol=EXACT)
    assert y.dtype == np.float64
    assert (
        np.max(np.abs(np.asarray(y) - formula(name, x, scale, bias, eps=2 * EPS))) > 1e-5
    )  # the formula notices another eps


@every_norm
@every_affine
def test_gradients_are_autodiff_s_and_finite_differences(name, affine):
    args = arrays(affine, shape=(2, 2, 5))
    weights = np.random.default_rng(1).normal(size=args[0].shape)
    ours = functools.partial(NORMS[name], eps=EPS)
    given = [i for i, arg in enumerate(args) if arg is not None]

    def gradients(norm):
        return jax.jit(jax.grad(lambda *a: jnp.sum(weights * norm(*a)), argnums=given))(*args)

    naive = gradients(lambda *a: formula(name, *a, xp=jnp))
    for ours_leaf, naive_leaf in zip(gradients(ours), naive, strict=True):
        np.testing.assert_allclose(ours_leaf, naive_leaf, rtol=0, atol=EXACT * 10)
    only_given = [args[i] for i in given]

    @jax.jit
    def of_given(*leaves):
        full = dict(zip(given, leaves, strict=True))
        return ours(*(full.get(i) for i in range(3)))

    check_grads(of_given, only_given, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)  # central differences: step^2


@every_norm
def test_second_derivatives_exist(name):
    x = arrays(shape=(1, 1, 5))[0]

    def curvature(norm):
        first = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.cos(first(x)))))(x)

    ours = curvature(functools.partial(NORMS[name], eps=EPS))
    np.testing.assert_allclose(ours, curvature(lambda x: formula(name, x, xp=jnp)), rtol=0, atol=EXACT * 100)


@every_norm
@every_affine
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_backward_pass_keeps_the_input_and_the_scale(name, affine, dtype):
    x, scale, bias = (leaf if leaf is None else jnp.asarray(leaf, dtype) for leaf in arrays(affine))
    _, pull_back = jax.vjp(functools.partial(NORMS[name], eps=EPS), x, scale, bias)
    kept = sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull_back))
    # And of the bias an empty slice, for its dtype.
    expected = [(x.shape, dtype), *[((7,), dtype)] * affine[0], *[((0,), dtype)] * affine[1]]
    assert kept == sorted(expected)


def test_the_naive_backward_pass_keeps_more():
    x, scale, bias = arrays()
    _, pull_back = jax.vjp(lambda *a: formula("layer_norm", *a, xp=jnp), x, scale, bias)
    assert sum(leaf.shape == x.shape for leaf in jax.tree.leaves(pull_back)) > 1


@every_norm
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_wide_statistics_and_its_own_output(name, dtype):
    # 4,096 values near 100: their sum of squares is 4e7, above float16's largest value, and each addition would round in bfloat16
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + rng.normal(size=(1, 2, 4096)), dtype)
    y = jax.jit(functools.partial(NORMS[name], eps=1e-6))(x)
    assert y.dtype == dtype
    expected = formula(name, np.asarray(x).astype(np.float64), eps=1e-6)
    # float32 statistics leave the one rounding of the result; the mean of 100 costs LayerNorm 100 * 2^-24 of its unit
    one_rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected) + 1e-4
    assert np.all(np.abs(np.asarray(y).astype(np.float64) - expected) <= one_rounding)
    # The control: in float16 the sum of squares overflows. (XLA may keep bfloat16 sums in float32 unasked.)
    if dtype == "float16":
        in_dtype = np.asarray(formula(name, x, eps=1e-6, xp=jnp)).astype(np.float64)
        assert not np.all(np.abs(in_dtype - expected) <= one_rounding)


@every_norm
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gradients_have_wide_sums(name, dtype):
    rows, width = 4096, 5
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, rows, width)) + 1, dtype)
    scale, bias = jnp.ones(width, dtype), jnp.zeros(width, dtype)

    def total(x, scale, bias):
        return jnp.sum(NORMS[name](x, scale, bias, eps=EPS).astype(jnp.float32))

    dx, dscale, dbias = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, scale, bias)
    assert (dx.dtype, dscale.dtype, dbias.dtype) == (dtype,) * 3
    live = np.ones(width) if "packed" not in name else np.arange(width) < width - 1
    np.testing.assert_array_equal(
        np.asarray(dbias).astype(np.float64), rows * live
    )  # a bfloat16 sum of ones stops at 256
    wide = formula(name, np.asarray(x).astype(np.float64))
    np.testing.assert_allclose(
        np.asarray(dscale).astype(np.float64),
        wide.sum((0, 1)) * live,
        rtol=float(jnp.finfo(dtype).eps),
        atol=1e-2,  # rows whose terms cancel: 4096 float32 additions of values near 1
    )


@pytest.mark.parametrize("basis", ["reflect", "drop"])
def test_the_spare_lane_is_ignored_written_one_and_gets_no_gradient(basis):
    x, scale, bias = arrays()
    norm = functools.partial(crms_norm_packed, eps=EPS, basis=basis)
    for spare in (0.0, 1e30, np.inf, np.nan):
        y, pull_back = jax.vjp(norm, jnp.asarray(x).at[..., -1].set(spare), scale, bias)
        np.testing.assert_array_equal(y[..., -1], 1)
        compact = crms_norm(x[..., :-1], scale[:-1], bias[:-1], eps=EPS, basis=basis)
        np.testing.assert_allclose(y[..., :-1], compact, rtol=0, atol=EXACT)
        for gradient in pull_back(np.ones_like(x)):
            assert np.all(np.isfinite(gradient))
            np.testing.assert_array_equal(gradient[..., -1], 0)
            assert np.any(gradient[..., :-1] != 0)


@every_norm
def test_vmap_and_jit_and_eager_agree(name):
    args = arrays()
    norm = functools.partial(NORMS[name], eps=EPS)
    whole = norm(*args)
    np.testing.assert_allclose(jax.vmap(norm, (0, None, None))(*args), whole, rtol=0, atol=EXACT)
    np.testing.assert_allclose(jax.jit(norm)(*args), whole, rtol=0, atol=EXACT)
    per_row = jax.vmap(jax.grad(lambda x, s: jnp.sum(norm(x, s) ** 3), argnums=1), (0, None))(*args[:2])
    together = jax.grad(lambda x, s: jnp.sum(norm(x, s) ** 3), argnums=1)(*args[:2])
    np.testing.assert_allclose(per_row.sum(0), together, rtol=0, atol=EXACT * 100)


def test_rms_norm_is_layer_norm_on_zero_mean_alone():
    x, scale, bias = arrays()
    centred = x - x.mean(-1, keepdims=True)
    expected = layer_norm(x, scale, bias, eps=EPS)
    np.testing.assert_allclose(rms_norm(centred, scale, bias, eps=EPS), expected, rtol=0, atol=EXACT)
    assert np.max(np.abs(rms_norm(x, scale, bias, eps=EPS) - expected)) > 1e-2


@pytest.mark.parametrize("basis", ["reflect", "drop"])
def test_crms_norm_is_layer_norm_in_its_coordinates(basis):
    from prenorm_jax.bases import BASES, drop_last

    x, _, _ = arrays()
    z = drop_last(BASES[basis]["writer"](x, -1), -1)
    there = BASES[basis]["back_writer"](np.asarray(crms_norm(z, eps=EPS, basis=basis)), -1)
    np.testing.assert_allclose(there, layer_norm(x, eps=EPS), rtol=0, atol=EXACT)
    other = {"reflect": "drop", "drop": "reflect"}[basis]
    assert np.max(np.abs(crms_norm(z, eps=EPS, basis=basis) - crms_norm(z, eps=EPS, basis=other))) > 1e-3


def test_a_large_mean_costs_layer_norm_little():
    # two passes: float32 loses mean/std * 2^-24, not its square
    x = np.random.default_rng(0).normal(size=(1, 8, 256))
    y = layer_norm(jnp.asarray(x + 100, jnp.float32), eps=1e-6)
    np.testing.assert_allclose(y, formula("layer_norm", x, eps=1e-6), rtol=0, atol=5e-5)


@every_norm
@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (np.ones((2, 3), np.int32), {"eps": 0.0}, "norm of a int32 array: expected a floating dtype"),
        (np.ones((2, 3)), {"eps": -1.0}, "eps: got -1.0; allowed: 0 or larger"),
        (np.ones((2, 3)), {"eps": 0.0, "scale": np.ones(2)}, r"scale: got shape \(2,\); expected \(3,\)"),
        (np.ones((2, 3)), {"eps": 0.0, "bias": np.ones((1, 3))}, r"bias: got shape \(1, 3\); expected \(3,\)"),
    ],
)
def test_wrong_arguments_are_one_clear_line(name, x, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        NORMS[name](x, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("norm", [crms_norm, crms_norm_packed])
def test_an_unknown_basis_is_refused(norm):
    with pytest.raises(ValueError, match="basis: got 'rotate'; allowed: reflect, drop"):
        norm(np.ones((2, 3)), eps=0.0, basis="rotate")
