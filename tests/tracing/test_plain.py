"""Plain JAX programs: every way to write a LayerNorm, every way to store a leaf, and what must be left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax.tracing import ConversionError, convert, register_rule
from prenorm_jax.tracing.rules import _RULES

D, V, H, B, L = 8, 11, 2, 2, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape) + 0.2)


def rsqrt_norm(x, p):
    m = jnp.mean(x, -1, keepdims=True)
    return (x - m) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * p["scale"][None, None] + p["bias"][
        None, None
    ]


def sqrt_norm(x, p):
    m = x.sum(-1) / D
    c = x - m[..., None]
    s = jnp.sqrt(jnp.sum(c**2, -1) / D + 1e-5)
    return c / s[..., None] * p["scale"][None, None] + p["bias"][None, None]


def moment_norm(x, p):
    m = jnp.sum(x, -1, keepdims=True) * (1 / D)
    v = jnp.mean(x * x, -1, keepdims=True) - m * m
    return p["scale"][None, None] * ((x - m) / jnp.sqrt(jnp.maximum(v, 0) + 1e-5)) + p["bias"][None, None]


def folded_norm(x, p):
    """x * a + b, as inference kernels write it."""
    m = x.mean(-1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean((x - m) ** 2, -1, keepdims=True) + 1e-5)
    a = r * p["scale"][None, None]
    return x * a + (p["bias"][None, None] - m * a)


def einsum_norm(x, p):
    m = jnp.einsum("bld,d->bl", x, jnp.full(D, 1 / D))[..., None]
    c = x - m
    return (
        c * jax.lax.rsqrt(jnp.einsum("bld,bld->bl", c, c)[..., None] / D + 1e-5) * p["scale"][None, None]
        + p["bias"][None, None]
    )


def einsum_moment_norm(x, p):
    m = x @ np.full((D, 1), 1 / D)
    v = jnp.einsum("bld,bld->bl", x, x)[..., None] / D - m**2
    return (x - m) * jax.lax.rsqrt(v + 1e-5) * p["scale"][None, None] + p["bias"][None, None]


def ones_norm(x, p):
    c = x - x @ (jnp.ones((D, 1), jnp.float32).astype(x.dtype) / D)
    v = (c * c) @ (jnp.ones((1, D)).T * (1 / D))
    return c * jax.lax.rsqrt(v + 1e-5) * p["scale"][None, None] + p["bias"][None, None]


def wide_norm(x, p):
    y = x.astype(jnp.float32)
    m, v = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    return ((y - m) * jax.lax.rsqrt(v + 1e-5)).astype(x.dtype) * p["scale"][None, None] + p["bias"][None, None]


def copied_norm(x, p):
    """Statistics of a copy in another shape."""
    y = x.reshape(*x.shape[:-1], 1, D)
    return (x - y.mean(-1)) / jnp.sqrt(y.var(-1) + 1e-5) * p["scale"][None, None] + p["bias"][None, None]


def copied_moment_norm(x, p):
    y = x[:, :, None]
    m = y.mean(-1)
    return (x - m) / jnp.sqrt((y * y).mean(-1) - m * m + 1e-5) * p["scale"][None, None] + p["bias"][None, None]


def gamma_minus_one_norm(x, p):
    m, v = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - m) / jnp.sqrt(v + 1e-5) * (1 + p["scale"][None, None])


NORMS = [
    rsqrt_norm,
    sqrt_norm,
    moment_norm,
    folded_norm,
    einsum_norm,
    einsum_moment_norm,
    ones_norm,
    wide_norm,
    copied_norm,
    copied_moment_norm,
    gamma_minus_one_norm,
]


def affine():
    return {"scale": normal(D), "bias": normal(D)}


def attention(h, p):
    q, k, v = (jnp.einsum("bld,dhk->bhlk", h, p[name]) for name in "qkv")
    s = jnp.einsum("bhlk,bhmk->bhlm", q, k)
    s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool))[None, None], s, -1e9)
    return jnp.einsum("bhlm,bhmk,hkd->bld", jax.nn.softmax(s), v, p["o"])


def block_params():
    heads = {name: normal(D, H, D // H) for name in "qkv"} | {"o": normal(H, D // H, D)}
    return {
        "ln1": affine(),
        "ln2": affine(),
        "attn": heads,
        "up": normal(D, 12),
        "up_b": normal(12),
        "down": normal(12, D),
        "down_b": normal(D),
    }


def gpt_params(layers=2, **more):
    return {
        "emb": normal(V, D),
        "pos": normal(16, D),
        "blocks": [block_params() for _ in range(layers)],
        "final": affine(),
        "head": normal(D, V),
        **more,
    }


def block(x, p, norm):
    x = x + attention(norm(x, p["ln1"]), p["attn"])
    h = jax.nn.gelu(norm(x, p["ln2"]) @ p["up"] + p["up_b"][None, None])
    return x + h @ p["down"] + p["down_b"][None, None]


def gpt(norm=rsqrt_norm):
    def fn(p, tokens):
        x = p["emb"][tokens] + p["pos"][None, : tokens.shape[1]]
        for b in p["blocks"]:
            x = block(x, b, norm)
        return norm(x, p["final"]) @ p["head"]

    return fn


def tokens(b=B, n=L):
    return jnp.arange(b * n).reshape(b, n) % V


@pytest.mark.parametrize("norm", NORMS)
def test_every_form_of_layer_norm(check, norm):
    tol = 1e-5 if norm is wide_norm else 1e-10
    out = check(
        gpt(norm),
        gpt_params(1),
        tokens(),
        sites=3,
        tol=tol,
        others=[(tokens(3, 6),)],
        grads=norm in (rsqrt_norm, folded_norm),
    )
    sums = 1 if "einsum" in norm.__name__ else 2  # a contraction of two values counts as a product, not as a sum
    assert out.report.error <= 1e-10
    assert (out.report.reductions_before, out.report.reductions_after) == (3 * sums, 3 * sums - 3)


def test_layers_stacked_on_axis_one(check):
    params = gpt_params(3)
    params["blocks"] = jax.tree.map(lambda *a: jnp.stack(a, 1), *params["blocks"])

    def fn(p, tokens):
        x = p["emb"][tokens] + p["pos"][None, : tokens.shape[1]]
        stacked = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), p["blocks"])
        x, _ = jax.lax.scan(lambda x, b: (block(x, b, rsqrt_norm), None), x, stacked)
        return rsqrt_norm(x, p["final"]) @ p["head"]

    out = check(fn, params, tokens(), sites=3, fold=True)
    leaves = dict(out.report.leaves)
    assert leaves["blocks/down"] == (-1,)
    assert leaves["blocks/down_b"] == (-2,)
    assert {"blocks/ln2/scale", "blocks/ln2/bias"} <= set(out.report.folded)


def test_layers_taken_from_a_stack_by_index(check):
    params = gpt_params(2)
    params["blocks"] = jax.tree.map(lambda *a: jnp.stack(a), *params["blocks"])

    def fn(p, tokens):
        x = p["emb"][tokens] + p["pos"][None, : tokens.shape[1]]
        for k in range(2):
            x = block(x, jax.tree.map(lambda a, k=k: a[k], p["blocks"]), rsqrt_norm)
        return rsqrt_norm(x, p["final"]) @ p["head"]

    check(fn, params, tokens(), sites=5)


def test_one_block_used_at_every_depth(check):
    def fn(p, tokens):
        x = p["emb"][tokens]
        x = jax.lax.fori_loop(0, 3, lambda _, x: block(x, p["block"], rsqrt_norm), x)
        x = block(x, p["block"], rsqrt_norm)
        return rsqrt_norm(x, p["final"]) @ p["head"]

    check(
        fn,
        {"emb": normal(V, D), "block": block_params(), "final": affine(), "head": normal(D, V)},
        tokens(),
        sites=5,
    )


def test_a_leaf_that_reads_and_writes_in_a_loop(check):
    """w reads its own norm and the head, so the stream is recentered in the loop instead; the norm behind the loop pays for it."""

    def fn(p, x, n):
        def step(c):
            return c[0] + 1, c[1] + rsqrt_norm(c[1], p["ln"]) @ p["w"]

        _, y = jax.lax.while_loop(lambda c: c[0] < n, step, (0, x @ p["in"]))
        return rsqrt_norm(y, p["ln"]) @ p["w"][:, :3]

    params = {"in": normal(5, D), "ln": affine(), "w": normal(D, D)}
    for n in (0, 3):
        check(fn, params, normal(B, L, 5), jnp.asarray(n), sites=2, added=1)


def test_writers_in_a_while_loop(check):
    def fn(p, x, n):
        def step(c):
            return c[0] + 1, c[1] + jnp.tanh(rsqrt_norm(c[1], p["ln"]) @ p["w"]) @ p["out"]

        _, y = jax.lax.while_loop(lambda c: c[0] < n, step, (0, x @ p["in"]))
        return rsqrt_norm(y, p["ln"]) @ p["head"]

    params = {"in": normal(5, D), "ln": affine(), "w": normal(D, 6), "out": normal(6, D), "head": normal(D, 3)}
    for n in (0, 3):
        check(fn, params, normal(B, L, 5), jnp.asarray(n), sites=2)


def test_lora_recenters_the_last_factor(check):
    params = gpt_params(1)
    params["a"], params["b"] = normal(12, 2), normal(2, D)

    def fn(p, tokens):
        x = p["emb"][tokens]
        h = jnp.tanh(rsqrt_norm(x, p["blocks"][0]["ln1"]) @ p["blocks"][0]["up"])
        x = x + h @ p["blocks"][0]["down"] + 0.5 * (h @ p["a"]) @ p["b"]
        return rsqrt_norm(x, p["final"]) @ p["head"]

    out = check(fn, params, tokens(), sites=2, grads=True)
    assert ("b", (-1,)) in out.report.leaves
    assert "a" not in dict(out.report.leaves)


def test_merged_lora_is_recentered_in_both_summands(check):
    def fn(p, x):
        return rsqrt_norm(x @ (p["w"] + p["a"] @ p["b"]).T[:, :].T, p["ln"]) @ p["head"]

    params = {"w": normal(5, D), "a": normal(5, 2), "b": normal(2, D), "ln": affine(), "head": normal(D, 3)}
    check(fn, params, normal(B, L, 5), sites=1)


def test_transposed_kernels_and_splits(check):
    def fn(p, x):
        y = jnp.einsum("bli,di->bld", x, p["w"]) + jnp.concatenate([p["cls"], p["pos"]])[None]
        y = jax.lax.dynamic_update_slice(y, p["late"][None, None] + y[:, :1] * 0.5, (0, 0, 0))
        return rsqrt_norm(y[:, jnp.asarray([2, 0, 1, 3])], p["ln"]).reshape(B, -1, D) @ p["head"]

    params = {
        "w": normal(D, 5),
        "cls": normal(1, D),
        "pos": normal(L - 1, D),
        "late": normal(D),
        "ln": affine(),
        "head": normal(D, 3),
    }
    out = check(fn, params, normal(B, L, 5), sites=1)
    assert dict(out.report.leaves)["w"] == (-2,)


def test_a_constant_is_recentered_at_conversion(check):
    grid = np.random.default_rng(3).standard_normal((1, L, D))

    def fn(p, tokens):
        x = p["emb"][tokens] + grid + jnp.sin(jnp.arange(L * D).reshape(1, L, D))
        return rsqrt_norm(x, p["final"]) @ p["head"]

    out = check(fn, {k: gpt_params(0)[k] for k in ("emb", "final", "head")}, tokens(), sites=1)
    assert out.report.reductions_after == 1


def test_fold_leaves_ones_and_zeros_that_are_not_looked_at(check):
    out = check(gpt(), gpt_params(1, head_b=normal(V)), tokens(), sites=3, fold=True, others=[(tokens(1, 5),)])
    assert {"blocks/0/ln2/scale", "blocks/0/ln2/bias"} <= set(out.report.folded)
    assert "final/scale" not in out.report.folded  # its reader has no bias that could take beta
    ln2 = out.params["blocks"][0]["ln2"]
    assert jnp.all(ln2["scale"] == 1)
    assert jnp.all(ln2["bias"] == 0)
    other = jax.tree.map(lambda a: a, out.params)
    other["blocks"][0]["ln2"] = affine()
    assert jnp.array_equal(out.fn(other, tokens()), out.fn(out.params, tokens()))


@pytest.mark.parametrize(
    ("shape", "written", "takes"),
    [
        ((3,), lambda b, y: jax.lax.broadcast_in_dim(b, y.shape, (2,)), True),
        ((1, 3), lambda b, y: jax.lax.broadcast_in_dim(b, y.shape, (1, 2)), True),
        ((3, 1), lambda b, y: jnp.broadcast_to(b.T, y.shape), True),
        ((), lambda b, y: jnp.broadcast_to(b, y.shape), False),
        ((1,), lambda b, y: jnp.broadcast_to(b, y.shape), False),
        ((L, 3), lambda b, y: jnp.broadcast_to(b, y.shape), False),
        ((L, 1), lambda b, y: jnp.broadcast_to(b, y.shape), False),
    ],
)
def test_which_readers_biases_take_more(shape, written, takes):
    """A bias may be written as wide as what it is added to, but it has to be one number for each of its features."""

    def fn(p, x):
        y = rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"]
        return y + written(p["b"], y)

    params = {**{k: SMALL[k] for k in ("w", "ln", "head")}, "b": normal(*shape)}
    out = convert(fn, params, normal(B, L, 5), fold=True)
    assert set(out.report.folded) == ({"ln/scale", "ln/bias"} if takes else set())


def test_a_zero_scale_folds(check):
    params = gpt_params(1)
    params["blocks"][0]["ln2"]["scale"] = jnp.zeros(D)
    out = convert(gpt(), params, tokens(), fold=True)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(out.params))


# --- what must be left alone, and why ---


def kept(fn, params, *inputs, **kw):
    out = convert(fn, params, *inputs, partial=True, **kw)
    assert out.report.converted == 0, f"\n{out.report}"
    assert out.report.error < 1e-12
    assert jax.tree.all(jax.tree.map(jnp.array_equal, out.params, params))
    return out.report.sites[0].reason if out.report.sites else ""


@pytest.mark.parametrize(
    ("weights", "is_mean"),
    [
        (lambda: jnp.ones((D, 1)) / D, True),
        (lambda: -(jnp.zeros((D, 1)) - 1.0) / jnp.full((D, 1), 1.0 * D), True),
        (lambda: jnp.ones((D, 1)) / (D + 1), False),
        (lambda: jnp.ones((D, 1)) / jnp.arange(1, D + 1)[:, None], False),
        (lambda: jnp.ones((D, 1)) * (1 / D) * (1 + 1e-6), False),
        (lambda: (jnp.ones((D, 1)) + 1e-6).astype(jnp.bfloat16).astype(jnp.float64) / D, True),  # it is 1
    ],
)
def test_which_products_are_means(weights, is_mean):
    def fn(p, x):
        y = x @ p["w"]
        c = y - y @ weights()
        return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5) @ p["head"]

    out = convert(fn, SMALL, normal(B, L, 5), partial=True)
    assert (out.report.converted, len(out.report.sites)) == (is_mean, is_mean)


SMALL = {"w": normal(5, D), "ln": affine(), "head": normal(D, 3), "raw": normal(D, 3), "gate": normal(D)}
SMALL |= {"one": normal(), "each": normal(1, L, 1)}


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda p, x: (rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"], x @ p["w"]), "output 1 of the program"),
        (
            lambda p, x: rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"] + x @ p["w"] @ p["raw"],
            "dot_general reads its mean",
        ),
        (lambda p, x: rsqrt_norm(jax.nn.relu(x @ p["w"]), p["ln"]) @ p["head"], "does not pay"),
        (
            lambda p, x: rsqrt_norm(x @ p["w"] * p["gate"][None, None] * x[..., :1] ** p["gate"][None, None], p["ln"]),
            "does not pay",
        ),
        (
            lambda p, x: rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"] + (x @ p["w"]).mean(-1, keepdims=True),
            "output 0 of the program",
        ),
        (lambda p, x: rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"] + jnp.sum(p["w"] ** 2), "a mean of it is used in"),
        (lambda p, x: (x @ p["w"]) - jax.lax.stop_gradient((x @ p["w"]).mean(-1, keepdims=True)), ""),
        (lambda p, x: rsqrt_norm(x @ p["w"], p["ln"]) * jnp.exp(x @ p["w"]), "exp reads its mean"),
        (lambda p, x: rsqrt_norm(x @ p["w"] + p["one"], p["ln"]) @ p["head"], "a leaf that is one number for all"),
        (lambda p, x: rsqrt_norm(x @ p["w"] + p["each"], p["ln"]) @ p["head"], "a leaf that is one number for all"),
        (lambda p, x: rsqrt_norm(jnp.fft.fft(x @ p["w"]).real, p["ln"]) @ p["head"], "does not pay"),
    ],
    ids=[
        "returned",
        "raw reader",
        "relu",
        "gate",
        "mean as a feature",
        "weight decay",
        "stopped mean",
        "exp",
        "one number",
        "one number for each token",
        "no rule",
    ],
)
def test_kept_with_a_reason(fn, reason):
    assert reason in kept(fn, SMALL, normal(B, L, 5))


def test_a_reason_says_the_line_also_where_a_function_of_jax_was_called():
    def fn(p, x):
        y = jnp.clip(x @ p["w"], -3.0, 3.0)
        return rsqrt_norm(jnp.clip(rsqrt_norm(x @ p["w"], p["ln"]) @ p["w2"] + y, -3.0, 3.0), p["ln"]) @ p["head"]

    reasons = [s.reason for s in convert(fn, {**SMALL, "w2": normal(D, D)}, normal(B, L, 5), partial=True).report.sites]
    assert all("test_plain.py" in reason for reason in reasons), reasons


def test_an_unknown_primitive_is_named_and_can_be_taught():
    def fn(p, x):
        y = x @ p["w"]
        for _ in range(2):
            y = y + rsqrt_norm(y, p["ln"]) @ p["sq"]
        y = jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 2, 1), (1, 1, 1), "VALID")
        return rsqrt_norm(y, p["ln"]) @ p["head"]

    params = {**SMALL, "sq": normal(D, D)}
    rule = _RULES.pop("reduce_window_sum")
    try:
        out = convert(fn, params, normal(B, L, 5), partial=True)
        assert out.report.unknown == ("reduce_window_sum",)
        register_rule("reduce_window_sum", shift=rule.shift, zero=rule.zero)
        assert not convert(fn, params, normal(B, L, 5), partial=True).report.unknown
    finally:
        _RULES["reduce_window_sum"] = rule


def test_nothing_converted_is_an_error_that_shows_the_report():
    with pytest.raises(ConversionError, match=r"(?s)partial=True.*dot_general reads its mean"):
        convert(
            lambda p, x: rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"] + x @ p["w"] @ p["raw"], SMALL, normal(B, L, 5)
        )


def test_rms_norm_models_have_no_site():
    def fn(p, x):
        y = x @ p["w"]
        return y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5) @ p["head"]

    assert kept(fn, SMALL, normal(B, L, 5)) == ""


def test_effects_stay_in_order(capsys):
    def fn(p, x):
        jax.debug.print("first", ordered=True)
        y = rsqrt_norm(x @ p["w"], p["ln"])
        jax.debug.print("second", ordered=True)
        return y @ p["head"]

    out = convert(fn, SMALL, normal(B, L, 5), verify=False)
    capsys.readouterr()
    jax.block_until_ready(out.fn(out.params, normal(B, L, 5)))
    jax.effects_barrier()
    assert capsys.readouterr().out.split() == ["first", "second"]


def test_single_precision_programs_convert_in_a_single_precision_process():
    with jax.enable_x64(False):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), gpt_params(1))
        out = convert(gpt(), params, np.asarray(tokens()))  # int64 to NumPy, int32 to JAX
        assert out.report.error < 1e-10
        assert out.report.converted == 3
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(out.params))
        assert float(jnp.max(jnp.abs(out.fn(out.params, tokens()) - gpt()(params, tokens())))) < 1e-4


def test_conversion_under_jit_and_from_shapes_alone():
    params = gpt_params(1)

    @jax.jit
    def converted(p, t):
        out = convert(gpt(), p, t, verify=False)
        return out.fn(out.params, t)

    assert jnp.allclose(converted(params, tokens()), gpt()(params, tokens()), atol=1e-10)
    shapes = jax.eval_shape(lambda: params)
    assert convert(gpt(), shapes, jax.ShapeDtypeStruct((B, L), jnp.int32), verify=False).report.converted == 3
    with pytest.raises(ValueError, match="verify=False"):
        convert(gpt(), shapes, tokens())


def test_a_decision_that_is_wrong_at_another_shape_is_an_error():
    def fn(p, x):
        y = x @ p["w"]
        out = rsqrt_norm(y, p["ln"]) @ p["head"]
        return out + y[..., :3] if x.shape[1] > L else out

    out = convert(fn, SMALL, normal(B, L, 5))
    with pytest.raises(ConversionError, match="w: recentered, but its mean matters"):
        out.fn(out.params, normal(B, L + 1, 5))


def test_policies():
    fn = lambda p, x: rsqrt_norm(jax.nn.relu(x @ p["w"]), p["ln"]) @ p["head"]  # noqa: E731
    assert convert(fn, SMALL, normal(B, L, 5), activations="always").report.converted == 1
    assert "not zero-mean" in kept(fn, SMALL, normal(B, L, 5), activations="never")
    with pytest.raises(ValueError, match="pays, always, never"):
        convert(fn, SMALL, normal(B, L, 5), activations="sometimes")


def test_converting_twice_changes_nothing():
    out = convert(gpt(), gpt_params(1), tokens())
    again = convert(gpt(), out.params, tokens())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-14)), out.params, again.params))
