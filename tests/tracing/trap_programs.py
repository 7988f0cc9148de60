"""Programs made to fool the converter, put together from parts by hypothesis: starts, norms, branches, streams and ends.

Each part has a name, so that a search can say how often it met which trap. A program is
(start, ((stream, norm, branch, number), ...), norm, end); `build` makes a function fn(params, tokens, activations) of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

D, L, B, H = 4, 4, 2, 6


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
    shapes |= {"stack": (2, D, D), "stack_bias": (2, D), "head_bias": (3,)}
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


def norm_copied(x, axis=-1):
    """Statistics of a copy in another shape."""
    y = x[..., None, :]
    m = y.mean(-1)
    return (x - m) / jnp.sqrt((y * y).mean(-1) - m * m + 1e-3)


def norm_rms(x, axis=-1):
    return x * jax.lax.rsqrt((x * x).mean(axis, keepdims=True) + 1e-3)


def norm_mixed_variance(x, axis=-1):
    """The variance is not of the centered value."""
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt((x * x).mean(axis, keepdims=True) + 1e-3)


@jax.custom_vjp
def norm_custom(x):
    return norm_two_pass(x)


norm_custom.defvjp(lambda x: (norm_two_pass(x), x), lambda x, g: (g * x,))

NORMS = {
    "two-pass": norm_two_pass,
    "fast": norm_fast,
    "var": norm_var,
    "mean of some features": norm_wrong_mean,
    "half of the mean": norm_half_mean,
    "two axes": norm_two_axes,
    "groups": norm_groups,
    "of a copy": norm_copied,
    "rms": norm_rms,
    "variance of another value": norm_mixed_variance,
    "another axis": lambda x: norm_two_pass(x, 1),
    "false derivative rule": lambda x: norm_custom(x),
    "remat": jax.checkpoint(norm_var),
    "vmapped": jax.vmap(jax.vmap(norm_two_pass)),
}


def mlp(p, k, n):
    return jax.nn.gelu(n @ p.matrix(k, (D, H))) @ p.matrix(k, (H, D))


def straight_through(y):
    return y + jax.lax.stop_gradient(jnp.round(4 * y) / 4 - y)


BRANCHES = {
    "mlp": lambda p, k, x, n: mlp(p, k, n),
    "linear": lambda p, k, x, n: n @ p.matrix(k) + p.vector(k),
    "relu": lambda p, k, x, n: jax.nn.relu(n @ p.matrix(k)),
    "scaled by a leaf": lambda p, k, x, n: (n @ p.matrix(k)) * p.vector(k),
    "gated by channel": lambda p, k, x, n: (n @ p.matrix(k)) * jax.nn.sigmoid(n),
    "scaled by a mean": lambda p, k, x, n: (n @ p.matrix(k)) * n.mean(-1, keepdims=True),
    "raw reader": lambda p, k, x, n: (x @ p.matrix(k)) @ p.matrix(k + 1),
    "mean as a feature": lambda p, k, x, n: n @ p.matrix(k) + x.mean(-1, keepdims=True) * p.vector(k),
    "transposed leaf": lambda p, k, x, n: n @ p.matrix(k).T,
    "mean over tokens": lambda p, k, x, n: jnp.einsum("bld,de->ble", n, p.matrix(k)).mean(1, keepdims=True) + 0 * n,
    "masked by channel": lambda p, k, x, n: jnp.where(n > 0, n @ p.matrix(k), 0.0),
    "masked by token": lambda p, k, x, n: jnp.where((n[..., :1] > 0), n @ p.matrix(k), 0.0),
    "stopped": lambda p, k, x, n: jax.lax.stop_gradient(n @ p.matrix(k)),
    "rounded, straight through": lambda p, k, x, n: straight_through(n @ p.matrix(k)),
    "summed along tokens": lambda p, k, x, n: jnp.cumsum(n @ p.matrix(k), 1),
    "summed along features": lambda p, k, x, n: jnp.cumsum(n @ p.matrix(k), 2),
    "softmax": lambda p, k, x, n: jax.nn.softmax(n @ p.matrix(k)),
    "norm's result": lambda p, k, x, n: n,
    "rolled": lambda p, k, x, n: jnp.roll(n @ p.matrix(k), 1, -1),
    "sorted": lambda p, k, x, n: jnp.sort(n @ p.matrix(k), -1),
    "largest": lambda p, k, x, n: jnp.pad(jax.lax.top_k(n @ p.matrix(k), 2)[0], ((0, 0), (0, 0), (0, D - 2))),
    "padded": lambda p, k, x, n: jnp.pad((n @ p.matrix(k))[:, :, :-1], ((0, 0), (0, 0), (0, 1))),
    "constant added": lambda p, k, x, n: jnp.linspace(0.0, 1.0, D)[None, None] + n @ p.matrix(k),
    "one of two writers": lambda p, k, x, n: jax.lax.cond(
        n[0, 0, 0] > 0, lambda: n @ p.matrix(k), lambda: n @ p.matrix(k + 1)
    ),
    "writer or not": lambda p, k, x, n: jax.lax.cond(n[0, 0, 0] > 0, lambda: n @ p.matrix(k), lambda: n),
    "steered by the mean": lambda p, k, x, n: jax.lax.cond(
        x.mean() > 0, lambda: n @ p.matrix(k), lambda: n @ p.matrix(k + 1)
    ),
    "product of leaves": lambda p, k, x, n: n @ (p.matrix(k) * p.matrix(k + 1)),
    "leaf used twice": lambda p, k, x, n: n @ p.matrix(k) @ p.matrix(k),
    "squashed": lambda p, k, x, n: (n @ p.matrix(k)) / (1.0 + jnp.abs(n @ p.matrix(k))),
    "rows of a leaf": lambda p, k, x, n: jnp.take(p.matrix(k), jnp.arange(L) % D, axis=0)[None] + 0 * n,
    "slice of a stack": lambda p, k, x, n: n @ p.params["stack"][k % 2] + p.params["stack_bias"][k % 2][None, None],
}


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


STREAMS = {
    "residual": lambda p, k, x, norm, f: x + f(p, k, x, norm(x)),
    "Post-LN": lambda p, k, x, norm, f: norm(x + f(p, k, x, x)),
    "norm behind the branch": lambda p, k, x, norm, f: x + norm(f(p, k, x, x)),
    "residual of the norm": lambda p, k, x, norm, f: norm(x) + f(p, k, x, norm(x)),
    "token set in place": lambda p, k, x, norm, f: x.at[:, 0].set(f(p, k, x, norm(x))[:, 0]),
    "feature added in place": lambda p, k, x, norm, f: x.at[:, :, 0].add(f(p, k, x, norm(x))[:, :, 0]),
    "function applied in place": lambda p, k, x, norm, f: x.at[:, 0].apply(jnp.tanh) + f(p, k, x, norm(x)),
    "scaled": lambda p, k, x, norm, f: x * 0.5 + f(p, k, x, norm(x)),
    "token appended": lambda p, k, x, norm, f: jnp.concatenate([x[:, 1:], f(p, k, x, norm(x))[:, :1]], 1),
    "norm over joined tokens": lambda p, k, x, norm, f: norm(x.reshape(B, L // 2, 2 * D)).reshape(B, L, D) + x,
    "squashed in front of the norm": lambda p, k, x, norm, f: x + f(p, k, x, norm(jnp.tanh(x))),
    "maximum": lambda p, k, x, norm, f: jnp.maximum(x, f(p, k, x, norm(x))),
    "reversed": lambda p, k, x, norm, f: x[:, ::-1] + f(p, k, x, norm(x)),
    "mean of the norm": lambda p, k, x, norm, f: x + f(p, k, x, norm(x) - norm(x).mean(-1, keepdims=True)),
    "remat": lambda p, k, x, norm, f: jax.checkpoint(lambda y: y + f(p, k, y, norm(y)))(x),
    "scan": lambda p, k, x, norm, f: scanned(p, k, x, norm),
    "scan that returns the stream": lambda p, k, x, norm, f: scanned_with_use(p, k, x, norm),
    "loop": lambda p, k, x, norm, f: looped(p, k, x, norm),
    "features and tokens exchanged": lambda p, k, x, norm, f: (
        jnp.transpose(norm(jnp.transpose(x, (0, 2, 1))), (0, 2, 1)) + x
    ),
    "mean added": lambda p, k, x, norm, f: x + f(p, k, x, norm(x)) + x.mean(-1, keepdims=True),
}

STARTS = {
    "embedding": lambda p, t, a: p.params["emb"][t] + p.params["pos"][None],
    "norm behind the embedding": lambda p, t, a: (
        norm_var(p.params["emb"][t] + p.params["pos"][None]) * p.vector(0) + p.vector(1)
    ),
    "projection": lambda p, t, a: a @ p.matrix(0) + p.vector(0),
    "input": lambda p, t, a: a,
    "one-hot": lambda p, t, a: jax.nn.one_hot(t, 7) @ p.params["emb"],
    "fixed positions": lambda p, t, a: p.params["emb"][t] * 2.0 + jnp.sin(jnp.arange(L * D).reshape(1, L, D) * 1.0),
}


def by_row(x):
    """One number for each row, as a gate or a mask is, that does not see the mean."""
    return 1.0 / (1.0 + jnp.var(x, -1, keepdims=True))


ENDS = {
    "head": lambda p, x, n: n @ p.params["head"],
    "affine and head": lambda p, x, n: (n * p.vector(0) + p.vector(1)) @ p.params["head"],
    "affine, scaled by row": lambda p, x, n: (
        (n * p.vector(0) * by_row(x) + p.vector(1) * by_row(x)) @ p.params["head"] + p.params["head_bias"][None, None]
    ),
    "bias, scaled by row": lambda p, x, n: (
        (n + p.vector(1) * by_row(x)) @ p.params["head"] + p.params["head_bias"][None, None]
    ),
    "tied": lambda p, x, n: n @ p.params["emb"].T,
    "stream returned": lambda p, x, n: (n @ p.params["head"], x),
    "mean returned": lambda p, x, n: (n @ p.params["head"], x.mean(-1)),
    "deviation returned": lambda p, x, n: (n @ p.params["head"], x - x.mean(-1, keepdims=True)),
    "raw head": lambda p, x, n: x @ p.params["head"],
    "weight decay": lambda p, x, n: n @ p.params["head"] + 0.1 * sum(jnp.sum(v**2) for v in p.params.values()),
    "gradient": lambda p, x, n: jax.grad(lambda y: jnp.sum(norm_var(y) @ p.params["head"]))(x),
    "pooled": lambda p, x, n: n.mean(1) @ p.params["head"],
    "pooled and normed": lambda p, x, n: norm_var(x.mean(1)) @ p.params["head"],
}

TRAPS = {
    "a ReLU between writer and norm": {"relu"},
    "a gate per channel between writer and norm": {"gated by channel", "masked by channel", "scaled by a leaf"},
    "raw readers": {"raw reader", "raw head", "stream returned", "scan that returns the stream"},
    "Post-LN": {"Post-LN", "norm behind the branch", "residual of the norm"},
    "parameters used twice": {"leaf used twice", "product of leaves", "transposed leaf", "tied", "rows of a leaf"},
    "a stream updated in place": {"token set in place", "feature added in place", "function applied in place"},
    "a norm over another axis": {
        "another axis",
        "two axes",
        "features and tokens exchanged",
        "norm over joined tokens",
    },
    "a mean that is used elsewhere": {"mean as a feature", "mean added", "mean returned", "steered by the mean"},
    "instance and group norm": {"another axis", "groups"},
    "something that is almost an affine": {"affine, scaled by row", "bias, scaled by row"},
    "something that is almost a norm": {"mean of some features", "half of the mean", "variance of another value"},
    "derivative rules of their own": {"false derivative rule", "stopped", "rounded, straight through", "gradient"},
    "loops and branches": {"scan", "scan that returns the stream", "loop", "one of two writers", "writer or not"},
}
"""What each trap is called, and the parts that are one; RMSNorm models are those whose norms are all "rms"."""


def parts(program):
    """The names of a program's parts."""
    start, layers, norm, end = program
    return {start, norm, end} | {name for stream, n, branch, _ in layers for name in (stream, n, branch)}


def traps(program):
    """The names of a program's traps."""
    _, layers, norm, _ = program
    found = {trap for trap, own in TRAPS.items() if own & parts(program)}
    numbers = [k % 4 for *_, k in layers]
    if len(set(numbers)) < len(numbers):
        found.add("parameters used twice")
    return found | ({"RMSNorm models"} if {n for _, n, _, _ in layers} | {norm} == {"rms"} else set())


REAL = ("two-pass", "fast", "var")
number = st.integers(0, 3)
norm = st.sampled_from([*REAL, *NORMS])
stream = st.sampled_from(["residual", "residual", *STREAMS])
layer = st.tuples(stream, norm, st.sampled_from(list(BRANCHES)), number)
plain = st.tuples(st.just("residual"), st.sampled_from(REAL), st.sampled_from(["mlp", "linear"]), number)
start, end = st.sampled_from(list(STARTS)), st.sampled_from(list(ENDS))


def some(layers):
    return st.lists(layers, min_size=1, max_size=3).map(tuple)


def with_rms(program):
    """The same program as an RMSNorm model."""
    start, layers, _, end = program
    return start, tuple((stream, "rms", branch, k) for stream, _, branch, k in layers), "rms", end


mixed = st.tuples(start, some(st.one_of(layer, plain)), norm, end)
programs = st.tuples(mixed, st.integers(0, 19)).map(lambda pair: with_rms(pair[0]) if pair[1] == 7 else pair[0])
policies, folds = st.sampled_from(["pays", "always", "never"]), st.booleans()


def build(program):
    start, layers, norm, end = program

    def fn(params, tokens, activations):
        p = Leaves(params)
        x = STARTS[start](p, tokens, activations)
        for stream, n, branch, k in layers:
            x = STREAMS[stream](p, k, x, NORMS[n], BRANCHES[branch])
        return ENDS[end](p, x, NORMS[norm](x))

    return fn


def inputs():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, 7, (B, L))), jnp.asarray(rng.standard_normal((B, L, D)))
