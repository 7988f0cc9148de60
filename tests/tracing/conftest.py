"""What every conversion has to satisfy: same function, same gradients, fewer reductions, and a control that can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax.tracing import convert


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The programs are small and run once: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def widened(tree):
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, tree
    )


def shaken(tree, seed=0, scale=0.3):
    """Parameters that hide nothing: no zero biases, no unit scales, a mean along every axis."""
    rng = np.random.default_rng(seed)

    def shake(a):
        if not (hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)):
            return a
        return jnp.asarray(np.asarray(a, np.float64) + scale * rng.standard_normal(a.shape) + 0.2, a.dtype)

    return jax.tree.map(shake, tree)


def loss_of(outputs):
    total = 0.0
    for k, y in enumerate(jax.tree.leaves(outputs)):
        if jnp.issubdtype(y.dtype, jnp.floating):
            y = y.astype(jnp.float64)
            total = total + jnp.sum(jnp.sin(y + 0.1 * k) * jnp.linspace(0.5, 1.5, y.size).reshape(y.shape))
    return total


def worst(a, b):
    gaps = [0.0]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating) and x.size:
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            gaps.append(float(np.max(np.abs(x - y)) / max(1.0, np.max(np.abs(x)))))
    return max(gaps)


def feature_sums(fn, *args):
    """reduce_sum equations over floats in a jaxpr, however deep."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == "reduce_sum" and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                value = getattr(value, "jaxpr", value)
                total += count(value) if hasattr(value, "eqns") else 0
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def check(fn, params, *inputs, sites, added=0, kept=0, others=(), tol=1e-10, grads=False, halves=False, **options):
    """Convert and hold against the original; `others` are further inputs (other shapes) for the converted function, `grads` asks for
    the parameters' gradients, too, and `halves` for half the reductions, but for the `added` ones."""
    params = shaken(widened(params))
    out = convert(fn, params, *inputs, **options)
    assert out.report.converted == sites, f"\n{out.report}"
    assert len(out.report.sites) == sites + kept, f"\n{out.report}"
    assert len(out.report.activations) == added, f"\n{out.report}"
    assert out.report.error is None or out.report.error <= tol
    assert jax.tree.structure(out.params) == jax.tree.structure(params)
    if halves:
        assert out.report.reductions_after - added == out.report.reductions_before / 2, f"\n{out.report}"
    original, converted = jax.jit(fn), jax.jit(out.fn)
    for args in (inputs, *others):
        assert worst(original(params, *args), converted(out.params, *args)) <= tol
    if out.report.leaves:  # the control: parameters that were not recentered must be caught
        assert worst(original(params, *inputs), converted(params, *inputs)) > 1e-4
    if grads:
        wanted = jax.jit(jax.grad(lambda p: loss_of(fn(p, *inputs)), allow_int=True))(params)
        found = jax.jit(jax.grad(lambda p: loss_of(out.fn(out.prepare(p), *inputs)), allow_int=True))(params)
        assert worst(wanted, found) <= 10 * tol
    return out


@pytest.fixture(name="check")
def check_fixture():
    return check
