"""Functions with derivative rules of their own: entered where the rule is the true derivative, left alone where it is not."""

import jax
import jax.numpy as jnp
import pytest
from test_plain import SMALL, B, D, L, kept, normal, rsqrt_norm

from prenorm_jax import norms
from prenorm_jax.tracing import convert


def plain_norm(x):
    c = x - x.mean(-1, keepdims=True)
    return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)


def forward(x):
    """Keeps what the textbook derivative needs."""
    c = x - x.mean(-1, keepdims=True)
    r = jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)
    return c * r, (c * r, r)


def backward(kept, g):
    n, r = kept
    return (r * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True)),)


def by_vjp(backward):
    norm = jax.custom_vjp(lambda x: plain_norm(x))
    norm.defvjp(forward, backward)
    return norm


def by_jvp():
    norm = jax.custom_jvp(lambda x: plain_norm(x))
    norm.defjvps(
        lambda t, y, x: forward(x)[1][1] * (t - t.mean(-1, keepdims=True) - y * (t * y).mean(-1, keepdims=True))
    )
    return norm


TRUE_RULES = {
    "vjp": by_vjp(backward),
    "jvp": by_jvp(),
    "this package's": lambda x: norms.layer_norm(x, eps=1e-5),
}


@pytest.mark.parametrize("kind", TRUE_RULES)
def test_a_norm_whose_rule_is_the_derivative_is_entered(check, kind):
    norm = TRUE_RULES[kind]
    check(lambda p, x: norm(x @ p["w"]) @ p["head"], SMALL, normal(B, L, 5), sites=1, grads=True)


FALSE_RULES = {
    "identity": lambda kept, g: (g,),
    "without the mean": lambda kept, g: (kept[1] * (g - kept[0] * (g * kept[0]).mean(-1, keepdims=True)),),
    "one per mille off": lambda kept, g: (1.001 * backward(kept, g)[0],),
    "clipped": lambda kept, g: (jnp.clip(backward(kept, g)[0], -1e6, 1e6),),
    "statistics held": lambda kept, g: (kept[1] * (g - g.mean(-1, keepdims=True)),),
}


@pytest.mark.parametrize("kind", FALSE_RULES)
def test_a_norm_with_another_rule_keeps_it(kind):
    norm = by_vjp(FALSE_RULES[kind])
    fn = lambda p, x: norm(x @ p["w"]) @ p["head"]  # noqa: E731
    reason = kept(fn, SMALL, normal(B, L, 5))
    assert "custom derivative rule" in reason
    assert ("not analytic" if kind == "clipped" else "not its function's derivative") in reason
    assert convert(fn, SMALL, normal(B, L, 5), inline_custom=True).report.converted == 1


def test_bfloat16_and_other_shapes_are_judged_alike():
    """The rule is evaluated in float64 though it was written for bfloat16; another batch size takes the same decision."""
    norm = TRUE_RULES["vjp"]

    def fn(p, x):
        return norm((x @ p["w"]).astype(jnp.bfloat16)).astype(x.dtype) @ p["head"]

    out = convert(fn, SMALL, normal(B, L, 5))
    assert out.report.converted == 1
    assert out.fn(out.params, normal(3, L, 5)).shape == (3, L, 3)


def test_an_rms_norm_keeps_its_rule():
    """There is no mean in it, so there is nothing to gain from looking inside."""
    norm = jax.custom_vjp(lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)))
    norm.defvjp(lambda x: jax.vjp(norm.fun, x), lambda pull, g: pull(g))

    def fn(p, x):
        return norm(rsqrt_norm(x @ p["w"], p["ln"]) @ p["w2"]) @ p["head"]

    params = {**SMALL, "w2": normal(D, D)}
    out = convert(fn, params, normal(B, L, 5))
    assert "custom_vjp_call" in str(jax.make_jaxpr(out.fn)(out.params, normal(B, L, 5)))


def test_custom_rules_off_the_stream_survive(check):
    @jax.custom_jvp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defjvps(lambda t, _, x: t)

    def fn(p, x):
        h = straight_through(rsqrt_norm(x @ p["w"], p["ln"]) @ p["head"])
        return rsqrt_norm(h @ p["back"], p["ln"]) @ p["head"]

    check(fn, {**SMALL, "back": normal(3, D)}, normal(B, L, 5), sites=2)


def test_a_custom_rule_may_not_know_that_a_mean_is_zero():
    """The function is centering, its rule is the identity's: the norm behind it has to keep its mean for the gradients' sake."""

    @jax.custom_vjp
    def center(x):
        return x - x.mean(-1, keepdims=True)

    center.defvjp(lambda x: (center.fun(x), None), lambda _, g: (g,))
    kept(lambda p, x: rsqrt_norm(center(x @ p["w"]), p["ln"]) @ p["head"], SMALL, normal(B, L, 5))
