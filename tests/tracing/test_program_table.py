"""Each program of `program_table` converts as far as the table says, or is kept for the reason it says."""

import functools

import jax
import jax.numpy as jnp
import pytest
from program_table import CASES, TOKENS, block, gpt_params, norm

from prenorm_jax.tracing import ConversionError, convert


@pytest.fixture(autouse=True)
def written_by_others():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_program(check, name):
    c = CASES[name]
    flags = [k for k, a in enumerate(c.inputs) if isinstance(a, bool)]

    @functools.wraps(c.fn)
    def fn(params, *inputs):  # jax.jit, which the checks use, would trace a flag
        return c.fn(params, *(c.inputs[k] if k in flags else a for k, a in enumerate(inputs)))

    out = check(fn, c.params, *c.inputs, sites=c.sites, kept=c.kept, added=c.added, grads=c.grads, **c.options)
    kept = [site.reason for site in out.report.sites if not site.converted]
    assert c.reason in (kept or [""])[0], f"\n{out.report}"
    places = [site.where for site in out.report.sites]
    assert all("program_table.py" in where for where in places), f"\n{out.report}"


def test_a_function_of_a_flag_follows_the_flag():
    c = CASES["a flag and a count among the inputs"]
    out = convert(c.fn, c.params, *c.inputs)
    for flag in (True, False):
        expected, found = c.fn(c.params, TOKENS, flag, 3), out.fn(out.params, TOKENS, flag, 3)
        assert jnp.max(jnp.abs(found - expected)) <= 1e-10 * jnp.max(jnp.abs(expected))


def test_parameters_in_another_structure():
    """A leaf that only some calls have may come and go; parameters that are others are refused."""

    def fn(p, t):
        x = p["e"][t] + p.get("a cache", 0.0)
        for b in p["b"]:
            x = block(b, x)
        return norm(x, p["n"]) @ p["h"]

    less = gpt_params()
    more = {"a cache": jnp.ones((1, 1, 8)).at[0, 0, 0].set(3.0), **less}
    for first, then in ((more, less), (less, more)):
        out = convert(fn, first, TOKENS)
        expected, found = fn(then, TOKENS), out.fn(out.prepare(then), TOKENS)
        assert jnp.max(jnp.abs(found - expected)) <= 1e-10 * jnp.max(jnp.abs(expected))
    with pytest.raises(ConversionError, match=r"b/0/a/o/b: .*no such leaf"):
        out.prepare({"params": less})
