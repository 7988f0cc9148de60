"""The kernels beside attention's, in Pallas's interpreter; on a GPU, accelerator/check_kernels.py runs the real ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import hopper, norms
from prenorm_jax.hopper import cross_entropy, gelu_gradient, norm_gradient, stack
from prenorm_jax.models.gelu import gelu

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")

KINDS = {
    "layer": norms.layer,
    "rms": norms.rms,
    "packed reflect": norms.packed,
    "packed drop": functools.partial(norms.packed, basis="drop"),
}


@pytest.fixture
def interpreter():
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams()


def by_kernel(kind, x, dn, dbranch, scale, sums, interpret):
    fields = {"divisor": kind.divisor, "eps": kind.eps, "centred": kind.centred}
    fields |= {"squared_sum": kind.squared_sum, "spare_lane": kind.spare_lane}
    return norm_gradient.norm_gradient(x, dn, dbranch, scale, column_sums=sums, interpret=interpret, **fields)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(12, 64), (8, 384)])
def test_a_norm_s_gradient_is_that_of_the_plain_form(name, rows, width, interpreter):
    rng = np.random.default_rng(0)
    x, dn, dbranch = (jnp.asarray(rng.normal(size=(rows, width)) + 1, jnp.bfloat16) for _ in range(3))
    kind, affine = KINDS[name](width, 1e-6), name == "layer"
    scale = jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32) if affine else None
    sums = ("dx", "dscale", "dbias") if affine else ("dx",)
    wide = [array.astype(jnp.float32) for array in (x, dn, dbranch)]
    for branch in (dbranch, None):
        wanted = norms._gradients_by_xla(kind, *wide[:2], None if branch is None else wide[2], scale, sums)
        found = by_kernel(kind, x, dn, branch, scale, sums, interpreter)
        assert [part.dtype for part in found] == [jnp.bfloat16, *[jnp.float32] * len(sums)]
        for part, expected in zip(found, wanted, strict=True):
            # dx is rounded to bfloat16; sums over rows are not.
            allowed = 2**-8 if part.dtype == jnp.bfloat16 else 1e-5
            assert np.abs(part.astype(jnp.float32) - expected).max() <= allowed * np.abs(expected).max()
    # The check can fail: with the main branch's gradient left out it does.
    assert np.abs(wanted[0] - wide[2]).max() > 2**-8 * np.abs(wanted[0]).max()


@pytest.mark.parametrize(("columns", "classes"), [(1152, 1100), (2048, 2048), (9344, 9280)])
def test_the_cross_entropy_s_passes_are_those_of_a_softmax(columns, classes, interpreter):
    rng = np.random.default_rng(0)
    rows = 3
    logits = jnp.asarray(9 * rng.normal(size=(rows, columns)), jnp.bfloat16)
    targets = jnp.asarray([0, classes - 1, 1024 % classes], jnp.int32)
    dloss = jnp.asarray(rng.uniform(0.5, 1, rows), jnp.float32)
    live = jnp.where(jnp.arange(columns) < classes, logits.astype(jnp.float32), -jnp.inf)
    wanted = jax.nn.logsumexp(live, axis=-1)
    found = cross_entropy.log_sum_exp(logits, classes=classes, interpret=interpreter)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    slope = (jnp.exp(live - wanted[:, None]) - jax.nn.one_hot(targets, columns)) * dloss[:, None]
    found = cross_entropy.gradient(logits, wanted, targets, dloss, classes=classes, interpret=interpreter)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found.astype(jnp.float32) - slope).max() <= 2**-8
    # The check can fail: with the next target it does.
    other = cross_entropy.gradient(logits, wanted, targets + 1, dloss, classes=classes, interpret=interpreter)
    assert np.abs(other.astype(jnp.float32) - slope).max() > 0.1


@pytest.mark.parametrize(("rows", "width", "outputs"), [(384, 256, 192), (256, 256, 64), (256, 384, 448)])
def test_the_product_in_front_of_a_gelu_s_gradient(rows, width, outputs, interpreter, monkeypatch):
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 2)  # so that a warpgroup has several tiles
    rng = np.random.default_rng(0)
    dy, matrix, z = (
        jnp.asarray(scale * rng.normal(size=shape), jnp.bfloat16)
        for scale, shape in ((1, (rows, outputs)), (outputs**-0.5, (width, outputs)), (2, (rows, width)))
    )
    exact = [array.astype(jnp.float32) for array in (dy, matrix, z)]
    wanted = jax.vjp(gelu, exact[2])[1](exact[0] @ exact[1].T)[0]
    found = gelu_gradient.gelu_gradient(dy, matrix, z, interpret=interpreter)
    assert found.dtype == jnp.bfloat16
    # A rounding to bfloat16, and what float32 leaves of 1 - tanh^2 far from 0.
    assert (np.abs(found.astype(jnp.float32) - wanted) <= 2**-8 * np.abs(wanted) + 1e-4).all()
    # The check can fail: without the slope it does.
    assert np.abs(exact[0] @ exact[1].T - wanted).max() > 0.1


@pytest.mark.parametrize("shape", [(3, 1024), (2, 8192)])
def test_arrays_are_put_together(shape, interpreter):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(3)]
    found = stack.stack(arrays, interpret=interpreter)
    np.testing.assert_array_equal(found, jnp.stack(arrays))
    assert (found[0] != found[1]).any()
    weights = jnp.asarray(rng.normal(size=found.shape), jnp.bfloat16)
    gradients = jax.grad(lambda arrays: (stack.stack(arrays, interpreter) * weights).astype(jnp.float32).sum())(arrays)
    np.testing.assert_array_equal(jnp.stack(gradients), weights)
    with pytest.raises(ValueError, match=r"hopper stack: got bfloat16\[3\]; expected one shape and dtype"):
        stack.stack([arrays[0].reshape(-1)[:3]])


def test_putting_together_lowers_for_a_gpu():
    arrays = [jax.ShapeDtypeStruct((768, 3072), jnp.bfloat16)] * 12
    lowered = jax.jit(lambda *arrays: stack.stack(arrays)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(("width", "outputs"), [(768, 192), (3072, 768), (5120, 1280)])
def test_the_gelu_s_gradient_lowers_for_a_gpu(width, outputs):
    shapes = (51200, outputs), (width, outputs), (51200, width)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    lowered = gelu_gradient.gelu_gradient.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("width", [192, 768, 1280])
def test_the_norm_s_gradient_lowers_for_a_gpu(width):
    x, scale = jax.ShapeDtypeStruct((4096, width), jnp.bfloat16), jax.ShapeDtypeStruct((width,), jnp.float32)
    kind = norms.layer(width, 1e-6)
    gradient = jax.jit(lambda x, scale: by_kernel(kind, x, x, x, scale, ("dx", "dscale", "dbias"), False))
    assert "mosaic_gpu" in gradient.trace(x, scale).lower(lowering_platforms=("cuda",)).as_text()


def test_the_cross_entropy_lowers_for_a_gpu():
    logits, row = jax.ShapeDtypeStruct((16384, 50304), jnp.bfloat16), jax.ShapeDtypeStruct((16384,), jnp.float32)
    targets = jax.ShapeDtypeStruct((16384,), jnp.int32)

    def both(logits, row, targets):
        sums = cross_entropy.log_sum_exp(logits, classes=50257)
        return cross_entropy.gradient(logits, sums, targets, row, classes=50257)

    lowered = jax.jit(both).trace(logits, row, targets).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2


def test_shapes_that_the_kernels_are_not_made_for():
    assert norm_gradient.fits(51200, 768)
    assert not any(norm_gradient.fits(*shape) for shape in ((51202, 768), (51200, 767), (51200, 32), (51200, 1344)))
    assert gelu_gradient.fits(16384, 3072, 768)
    assert not any(
        gelu_gradient.fits(*s) for s in ((16400, 3072, 768), (16384, 3000, 768), (16384, 3072, 760), (128, 128, 64))
    )
    assert cross_entropy.fits(50304, 50257)
    assert not any(cross_entropy.fits(*row) for row in ((50257, 50257), (256, 256), (50304, 49000)))
