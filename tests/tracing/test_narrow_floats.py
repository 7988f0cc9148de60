"""Conversions to fewer digits than bfloat16's are part of the function, not its rounding; and loops that end example by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prenorm_jax as pn

EIGHT_BITS = jnp.float8_e4m3fn
RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape) + 0.3, jnp.float32)
    for name, shape in (("e", (7, 8)), ("w", (8, 8)), ("h", (8, 3)))
}
TOKENS = jnp.arange(4)


def norm(x):
    return pn.layer_norm(x, eps=1e-6)


QUANTIZED = {
    "float8": lambda x: x.astype(EIGHT_BITS).astype(jnp.float32),
    "reduced": lambda x: jax.lax.reduce_precision(x, 8, 2),
}


@pytest.mark.parametrize("quantize", QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_table_is_not_recentered_in_front_of_it(quantize):
    def fn(params, tokens):
        return norm(quantize(params["e"])[tokens]) @ params["h"]

    with pytest.raises(pn.ConversionError, match="1 reduction and remove 1"):
        pn.convert(fn, PARAMS, TOKENS)

    # Behind it the activation is recentered, and the function stays.
    def twice(params, tokens):
        x = quantize(params["e"])[tokens]
        return (norm(x) + norm(x * 2 + 1)) @ params["h"]

    out = pn.convert(twice, PARAMS, TOKENS, activations="always")
    np.testing.assert_allclose(out.fn(out.params, TOKENS), twice(PARAMS, TOKENS), rtol=1e-4, atol=1e-5)
    assert not out.report.leaves


def test_rounding_to_half_precision_is_still_passed_through():
    def fn(params, tokens):
        return (
            norm(jax.lax.reduce_precision(params["e"].astype(jnp.bfloat16).astype(jnp.float32)[tokens], 8, 7))
            @ params["h"]
        )

    assert pn.convert(fn, PARAMS, TOKENS).report.leaves == (("e", (-1,)),)


def test_leaves_of_eight_bits():
    def fn(params, tokens):
        return norm(params["e"].astype(jnp.float32)[tokens]) @ params["h"]

    params = {**PARAMS, "e": PARAMS["e"].astype(EIGHT_BITS)}
    out = pn.convert(fn, params, TOKENS)
    assert out.params["e"].dtype == EIGHT_BITS
    spec = pn.trace(fn, params, TOKENS)
    there = jax.jit(lambda params: pn.to_pre_rmsnorm(params, spec))(params)
    assert there["e"].dtype == EIGHT_BITS


def test_a_loop_that_ends_example_by_example():
    def fn(params, tokens):
        def one(token):
            def body(carry):
                return carry[0] + 1, carry[1] + jnp.tanh(norm(carry[1])) @ params["w"]

            _, x = jax.lax.while_loop(lambda carry: carry[0] < token, body, (0, params["e"][token]))
            return norm(x) @ params["h"]

        return jax.vmap(one)(tokens)

    out = pn.convert(fn, PARAMS, TOKENS)
    assert out.report.converted
    assert out.report.error < 1e-12
    for tokens in (TOKENS, TOKENS[::-1]):
        np.testing.assert_allclose(out.fn(out.params, tokens), fn(PARAMS, tokens), rtol=2e-5, atol=2e-5)


def test_a_program_without_a_mean_says_what_is_looked_for():
    with pytest.raises(pn.ConversionError, match="no LayerNorm was seen: what is looked for is x less 1/n of its sum"):
        pn.convert(lambda params, tokens: params["e"][tokens] @ params["h"], PARAMS, TOKENS)


def test_a_norm_without_affine_that_is_kept_is_told():
    def fn(params, tokens):
        x = params["e"][tokens]
        return jnp.tanh(norm(x)) @ params["h"], norm(x) @ params["w"]

    kept = [norm for norm in pn.trace(fn, PARAMS, TOKENS).norms if norm.keep]
    assert [(norm.readers, norm.scale, norm.bias) for norm in kept] == [((), None, None)]
    assert "tanh" in kept[0].keep
    assert "test_narrow_floats" in kept[0].module


def test_a_quantized_scale_is_not_folded():
    """Its readers would get the scale as it is stored, where the function multiplies by the rounded one."""
    params = {**PARAMS, "g": jnp.linspace(0.51, 1.49, 8)}

    def fn(params, tokens):
        scale = params["g"].astype(EIGHT_BITS).astype(jnp.float32)[None]
        return (norm(params["e"][tokens]) * scale) @ params["h"]

    spec = pn.trace(fn, params, TOKENS)
    assert all("g" not in (norm.scale, norm.bias) for norm in spec.norms)
    folded = pn.fold_affine(params, spec)
    np.testing.assert_allclose(fn(folded, TOKENS), fn(params, TOKENS), rtol=1e-5)


def test_a_quantized_value_less_the_mean_of_another_is_no_layer_norm():
    def fn(params, tokens):
        x = params["e"][tokens]
        centered = QUANTIZED["reduced"](x) - x.mean(-1, keepdims=True)
        return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) @ params["h"]

    with pytest.raises(pn.ConversionError):
        pn.convert(fn, PARAMS, TOKENS, verify=False)
