"""Programs made to fool the converter: whatever it does to them, the function must stay the same.

`PRENORM_TRAPS=2000 pytest tests/tracing/test_traps.py -k random` runs the long search: as many programs, and their gradients.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prenorm_jax.tracing import ConversionError, convert, verify
from prenorm_jax.tracing.decision import decide
from prenorm_jax.tracing.shift import Shifts
from prenorm_jax.tracing.signature import Arguments, trace_program
from prenorm_jax.tracing.zero_mean import ZeroMean

PROGRAMS = int(os.environ.get("PRENORM_TRAPS", "25"))
D, L, B, H = 4, 4, 2, 6


@pytest.fixture(autouse=True, scope="module")
def one_by_one():
    """Thousands of programs of the same few operations: compiling each would take the longest."""
    old, verify.MOST_COMPILED = verify.MOST_COMPILED, 0
    yield
    verify.MOST_COMPILED = old


class Leaves:
    """Hands out parameters by number, so that a program may use one twice."""

    def __init__(self, params):
        self.params = params

    def matrix(self, k, shape=(D, D)):
        return (
            self.params[f"m{k % 4}"]
            if shape == (D, D)
            else self.params[f"up{k % 2}" if shape == (D, H) else f"down{k % 2}"]
        )

    def vector(self, k):
        return self.params[f"v{k % 4}"][None, None]


def parameters():
    rng = np.random.default_rng(0)
    shapes = {f"m{k}": (D, D) for k in range(4)} | {f"v{k}": (D,) for k in range(4)}
    shapes |= {
        "up0": (D, H),
        "up1": (D, H),
        "down0": (H, D),
        "down1": (H, D),
        "emb": (7, D),
        "pos": (L, D),
        "head": (D, 3),
    }
    shapes |= {"stack": (2, D, D), "stack_bias": (2, D)}
    return {name: jnp.asarray(rng.standard_normal(s) + 0.3) for name, s in shapes.items()}


def norm_two_pass(x, axis=-1):
    c = x - x.mean(axis, keepdims=True)
    return c * jax.lax.rsqrt((c * c).mean(axis, keepdims=True) + 1e-3)


def norm_fast(x, axis=-1):
    m = jnp.sum(x, axis, keepdims=True) * (1.0 / x.shape[axis])
    v = jnp.mean(jnp.square(x), axis, keepdims=True) - jnp.square(m)
    return (x - m) / jnp.sqrt(jnp.maximum(v, 0.0) + 1e-3)


def norm_var(x, axis=-1):
    return (x - jnp.mean(x, axis, keepdims=True)) / jnp.sqrt(jnp.var(x, axis, keepdims=True) + 1e-3)


def norm_wrong_mean(x, axis=-1):
    return (x - x[..., :2].mean(axis, keepdims=True)) / jnp.sqrt(jnp.var(x, axis, keepdims=True) + 1e-3)


def norm_half_mean(x, axis=-1):
    return (x - 0.5 * x.mean(axis, keepdims=True)) / jnp.sqrt(jnp.var(x, axis, keepdims=True) + 1e-3)


def norm_two_axes(x, axis=-1):
    return (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(jnp.var(x, (1, 2), keepdims=True) + 1e-3)


def norm_groups(x, axis=-1):
    return norm_two_pass(x.reshape(*x.shape[:-1], 2, -1)).reshape(x.shape)


def norm_rms(x, axis=-1):
    return x * jax.lax.rsqrt((x * x).mean(axis, keepdims=True) + 1e-3)


def norm_mixed_variance(x, axis=-1):
    """The variance is not of the centered value."""
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt((x * x).mean(axis, keepdims=True) + 1e-3)


@jax.custom_vjp
def norm_custom(x):
    return norm_two_pass(x)


norm_custom.defvjp(lambda x: (norm_two_pass(x), x), lambda x, g: (g * x,))

NORMS = [
    norm_two_pass, norm_fast, norm_var, norm_two_pass, norm_fast, norm_var, norm_wrong_mean, norm_half_mean, norm_two_axes,
    norm_groups, norm_rms, norm_mixed_variance, lambda x: norm_two_pass(x, 1), lambda x: norm_custom(x), jax.checkpoint(norm_var),
]  # fmt: skip


def mlp(p, k, n):
    return jax.nn.gelu(n @ p.matrix(k, (D, H))) @ p.matrix(k, (H, D))


BRANCHES = [
    lambda p, k, x, n: mlp(p, k, n),
    lambda p, k, x, n: n @ p.matrix(k) + p.vector(k),
    lambda p, k, x, n: jax.nn.relu(n @ p.matrix(k)),
    lambda p, k, x, n: (n @ p.matrix(k)) * p.vector(k),
    lambda p, k, x, n: (n @ p.matrix(k)) * jax.nn.sigmoid(n),
    lambda p, k, x, n: (n @ p.matrix(k)) * n.mean(-1, keepdims=True),
    lambda p, k, x, n: (x @ p.matrix(k)) @ p.matrix(k + 1),
    lambda p, k, x, n: n @ p.matrix(k) + x.mean(-1, keepdims=True) * p.vector(k),
    lambda p, k, x, n: n @ p.matrix(k).T,
    lambda p, k, x, n: jnp.einsum("bld,de->ble", n, p.matrix(k)).mean(1, keepdims=True) + 0 * n,
    lambda p, k, x, n: jnp.where(n > 0, n @ p.matrix(k), 0.0),
    lambda p, k, x, n: jnp.where((n[..., :1] > 0), n @ p.matrix(k), 0.0),
    lambda p, k, x, n: jax.lax.stop_gradient(n @ p.matrix(k)),
    lambda p, k, x, n: jnp.cumsum(n @ p.matrix(k), 1),
    lambda p, k, x, n: jnp.cumsum(n @ p.matrix(k), 2),
    lambda p, k, x, n: jax.nn.softmax(n @ p.matrix(k)),
    lambda p, k, x, n: n,
    lambda p, k, x, n: jnp.roll(n @ p.matrix(k), 1, -1),
    lambda p, k, x, n: jnp.pad((n @ p.matrix(k))[:, :, :-1], ((0, 0), (0, 0), (0, 1))),
    lambda p, k, x, n: jnp.linspace(0.0, 1.0, D)[None, None] + n @ p.matrix(k),
    lambda p, k, x, n: jax.lax.cond(n[0, 0, 0] > 0, lambda: n @ p.matrix(k), lambda: n @ p.matrix(k + 1)),
    lambda p, k, x, n: jax.lax.cond(n[0, 0, 0] > 0, lambda: n @ p.matrix(k), lambda: n),
    lambda p, k, x, n: n @ (p.matrix(k) * p.matrix(k + 1)),
    lambda p, k, x, n: n @ p.matrix(k) @ p.matrix(k),
    lambda p, k, x, n: (n @ p.matrix(k)) / (1.0 + jnp.abs(n @ p.matrix(k))),
    lambda p, k, x, n: jnp.take(p.matrix(k), jnp.arange(L) % D, axis=0)[None] + 0 * n,
    lambda p, k, x, n: n @ p.params["stack"][k % 2] + p.params["stack_bias"][k % 2][None, None],
]


def scanned(p, k, x, norm):
    def step(c, w):
        matrix, bias = w
        return c + norm(c) @ matrix + bias[None, None], c.mean(1)

    return jax.lax.scan(step, x, (p.params["stack"], p.params["stack_bias"]))[0]


def scanned_with_use(p, k, x, norm):
    def step(c, w):
        return c + norm(c) @ w, c

    out, all_c = jax.lax.scan(step, x, p.params["stack"])
    return out + 0.1 * jnp.tanh(all_c[0])


def looped(p, k, x, norm):
    return jax.lax.fori_loop(0, 2, lambda _, c: c + norm(c) @ p.matrix(k), x)


STREAM = [
    lambda p, k, x, norm, f: x + f(p, k, x, norm(x)),
    lambda p, k, x, norm, f: x + f(p, k, x, norm(x)),
    lambda p, k, x, norm, f: x + f(p, k, x, norm(x)),
    lambda p, k, x, norm, f: norm(x + f(p, k, x, x)),
    lambda p, k, x, norm, f: x + norm(f(p, k, x, x)),
    lambda p, k, x, norm, f: norm(x) + f(p, k, x, norm(x)),
    lambda p, k, x, norm, f: x.at[:, 0].set(f(p, k, x, norm(x))[:, 0]),
    lambda p, k, x, norm, f: x.at[:, :, 0].add(f(p, k, x, norm(x))[:, :, 0]),
    lambda p, k, x, norm, f: x * 0.5 + f(p, k, x, norm(x)),
    lambda p, k, x, norm, f: jnp.concatenate([x[:, 1:], f(p, k, x, norm(x))[:, :1]], 1),
    lambda p, k, x, norm, f: norm(x.reshape(B, L // 2, 2 * D)).reshape(B, L, D) + x,
    lambda p, k, x, norm, f: x + f(p, k, x, norm(jnp.tanh(x))),
    lambda p, k, x, norm, f: jnp.maximum(x, f(p, k, x, norm(x))),
    lambda p, k, x, norm, f: x[:, ::-1] + f(p, k, x, norm(x)),
    lambda p, k, x, norm, f: x + f(p, k, x, norm(x) - norm(x).mean(-1, keepdims=True)),
    lambda p, k, x, norm, f: jax.checkpoint(lambda y: y + f(p, k, y, norm(y)))(x),
    lambda p, k, x, norm, f: scanned(p, k, x, norm),
    lambda p, k, x, norm, f: scanned_with_use(p, k, x, norm),
    lambda p, k, x, norm, f: looped(p, k, x, norm),
    lambda p, k, x, norm, f: jnp.transpose(norm(jnp.transpose(x, (0, 2, 1))), (0, 2, 1)) + x,
    lambda p, k, x, norm, f: x + f(p, k, x, norm(x)) + x.mean(-1, keepdims=True),
]

STARTS = [
    lambda p, t, a: p.params["emb"][t] + p.params["pos"][None],
    lambda p, t, a: norm_var(p.params["emb"][t] + p.params["pos"][None]) * p.vector(0) + p.vector(1),
    lambda p, t, a: a @ p.matrix(0) + p.vector(0),
    lambda p, t, a: a,
    lambda p, t, a: jax.nn.one_hot(t, 7) @ p.params["emb"],
    lambda p, t, a: p.params["emb"][t] * 2.0 + jnp.sin(jnp.arange(L * D).reshape(1, L, D) * 1.0),
]

ENDS = [
    lambda p, x, n: n @ p.params["head"],
    lambda p, x, n: (n * p.vector(0) + p.vector(1)) @ p.params["head"],
    lambda p, x, n: n @ p.params["emb"].T,
    lambda p, x, n: (n @ p.params["head"], x),
    lambda p, x, n: (n @ p.params["head"], x.mean(-1)),
    lambda p, x, n: (n @ p.params["head"], x - x.mean(-1, keepdims=True)),
    lambda p, x, n: x @ p.params["head"],
    lambda p, x, n: n @ p.params["head"] + 0.1 * sum(jnp.sum(v**2) for v in p.params.values()),
    lambda p, x, n: jax.grad(lambda y: jnp.sum(norm_var(y) @ p.params["head"]))(x),
    lambda p, x, n: n.mean(1) @ p.params["head"],
    lambda p, x, n: norm_var(x.mean(1)) @ p.params["head"],
]


def pick(options):
    return st.integers(0, len(options) - 1)


layer = st.tuples(pick(STREAM), pick(NORMS), pick(BRANCHES), st.integers(0, 3))
plain = st.tuples(st.just(0), st.integers(0, 5), st.integers(0, 1), st.integers(0, 3))
programs = st.tuples(pick(STARTS), st.lists(st.one_of(layer, plain), min_size=1, max_size=3), pick(NORMS), pick(ENDS))


def build(program):
    start, layers, norm, end = program

    def fn(params, tokens, activations):
        p = Leaves(params)
        x = STARTS[start](p, tokens, activations)
        for stream, n, f, k in layers:
            x = STREAM[stream](p, k, x, NORMS[n], BRANCHES[f])
        return ENDS[end](p, x, NORMS[norm](x))

    return fn


def inputs():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, 7, (B, L))), jnp.asarray(rng.standard_normal((B, L, D)))


@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=PROGRAMS <= 25)
@given(programs, st.sampled_from(["pays", "always", "never"]), st.booleans())
def test_random_programs_stay_the_same(program, activations, fold):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        out = convert(build(program), parameters(), *inputs(), partial=True, activations=activations, fold=fold)
        assert out.report.error <= 1e-10, out.report


@settings(
    max_examples=PROGRAMS if PROGRAMS > 25 else 2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=PROGRAMS <= 25,
)
@given(programs, st.sampled_from(["pays", "always"]))
def test_gradients_of_random_programs_stay_the_same(program, activations):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params, rest = parameters(), inputs()
        arguments = Arguments.of(params, rest)
        before = trace_program(build(program), arguments).program
        floats = range(arguments.n_params)
        decision, _, after = decide(before, arguments.paths, floats, activations, fold=False)
        leaves = jax.tree.leaves(params)

        def loss(run, leaves):
            return sum(jnp.sum(jnp.sin(y)) for y in run([*leaves, *rest]))

        wanted = jax.grad(lambda a: loss(lambda args: before(*args), a))(leaves)
        found = jax.grad(lambda a: loss(lambda args: after(*decision.prepared(args)), a))(leaves)
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-8 * (1 + float(jnp.max(jnp.abs(a)))))


def test_the_search_converts_something():
    with jax.numpy_rank_promotion("allow"):
        out = convert(build((0, [(0, 0, 0, 0), (0, 1, 1, 1), (16, 2, 0, 0)], 2, 1)), parameters(), *inputs())
    assert out.report.converted == 4
    assert len(out.report.sites) == 4


def assert_caught(monkeypatch, program, lies):
    """With the analysis lying, verification has to fail; without, it has to pass."""
    with jax.numpy_rank_promotion("allow"):
        convert(build(program), parameters(), *inputs(), partial=True, activations="always")
        for owner, name, lie in lies:
            monkeypatch.setattr(owner, name, lie)
        with pytest.raises(ConversionError, match="verification failed"):
            convert(build(program), parameters(), *inputs(), partial=True, activations="always")


@pytest.mark.parametrize(
    "program", [(0, [(0, 0, 6, 0)], 0, 0), (0, [(0, 0, 0, 0)], 0, 4)], ids=["raw reader", "mean returned"]
)
def test_a_shift_believed_wrongly_is_caught(monkeypatch, program):
    assert_caught(monkeypatch, program, [(Shifts, "may_shift", lambda self, var, axes: True)])


@pytest.mark.parametrize("branch", [2, 3, 4], ids=["relu", "gate", "glu"])
def test_a_zero_mean_believed_wrongly_is_caught(monkeypatch, branch):
    lies = [
        (ZeroMean, "prove", lambda self, roots, made: lambda need: True),
        (ZeroMean, "needs", lambda self, need, old=ZeroMean.needs: old(self, need) or []),
    ]
    assert_caught(monkeypatch, (0, [(0, 0, branch, 0)], 0, 0), lies)
