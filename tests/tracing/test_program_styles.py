"""How a program is put together: loops, batches of models, precision, gradients and whole training steps as the function given."""

import functools

import jax
import jax.numpy as jnp
import pytest
from test_plain import normal
from test_text_and_speech import B, D, V, layer_norm, ln, mha, mha_params, mlp, mlp_params, tokens

from prenorm_jax.tracing import convert

pytestmark = pytest.mark.slow


def block(p, x):
    x = x + mha(p["attn"], layer_norm(p["ln1"], x))
    return x + mlp(p["mlp"], layer_norm(p["ln2"], x))


def block_params():
    return {"attn": mha_params(), "ln1": ln(), "mlp": mlp_params(), "ln2": ln()}


def stacked(n):
    return jax.tree.map(lambda *a: jnp.stack(a), *(block_params() for _ in range(n)))


def model(p, t, run=block):
    x = p["embed"][t]
    x, _ = jax.lax.scan(lambda x, b: (run(b, x), None), x, p["blocks"])
    return layer_norm(p["ln"], x) @ p["head"]


def model_params(n=2):
    return {"embed": normal(V, D), "blocks": stacked(n), "ln": ln(), "head": normal(D, V)}


def test_an_ensemble_by_vmap(check):
    params = jax.tree.map(lambda *a: jnp.stack(a), model_params(), model_params())
    check(lambda p, t: jax.vmap(model, (0, None))(p, t).mean(0), params, tokens(), sites=3)


def test_a_scan_that_carries_a_tuple_under_a_checkpoint_policy(check):
    def fn(p, t, key):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        def step(carry, b):
            x, loss, key = carry
            key, own = jax.random.split(key)
            y = block(b, x)
            y = jnp.where(jax.random.bernoulli(own, 0.5, (B, 1, 1)), y, x)
            return (y, loss + jnp.mean(layer_norm(b["ln1"], y) ** 2), key), jnp.argmax(layer_norm(b["ln2"], y), -1)

        (x, loss, _), path = jax.lax.scan(step, (p["embed"][t], 0.0, key), p["blocks"])
        return layer_norm(p["ln"], x) @ p["head"], loss, path

    check(fn, model_params(), tokens(), jax.random.key(0), sites=5, grads=True)


def test_layers_dropped_by_cond_in_a_scan(check):
    def fn(p, t, keep):
        def step(x, inputs):
            b, k = inputs
            return jax.lax.cond(k, lambda y: block(b, y), lambda y: y, x), None

        x, _ = jax.lax.scan(step, p["embed"][t], (p["blocks"], keep))
        return layer_norm(p["ln"], x) @ p["head"]

    check(fn, model_params(), tokens(), jnp.asarray([True, False]), sites=3)


def test_hidden_states_returned(check):
    """Normalized ones cost nothing; raw ones are wanted with their mean, and keep it."""

    def fn(p, t, raw):
        def step(x, b):
            y = block(b, x)
            return y, y if raw else layer_norm(b["ln1"], y)

        x, hidden = jax.lax.scan(step, p["embed"][t], p["blocks"])
        return layer_norm(p["ln"], x) @ p["head"], hidden

    check(functools.partial(fn, raw=False), model_params(), tokens(), sites=4)
    out = check(functools.partial(fn, raw=True), model_params(), tokens(), sites=0, kept=3, partial=True)
    assert all("output 1 of the program" in s.reason for s in out.report.sites)


def test_bfloat16_with_float32_norms(check):
    def norm(p, x):
        y = layer_norm(p, x.astype(jnp.float32))
        return y.astype(jnp.bfloat16)

    def fn(p, t):
        p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
        x = p["embed"][t]
        x = x + mha(p["attn"], norm(p["ln1"], x))
        x = x + mlp(p["mlp"], norm(p["ln2"], x))
        return (norm(p["ln"], x) @ p["head"]).astype(jnp.float32)

    params = {"embed": normal(V, D), **block_params(), "ln": ln(), "head": normal(D, V)}
    check(fn, params, tokens(), sites=3, tol=0.2)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    out = convert(fn, half, tokens())
    assert out.report.converted == 3
    assert out.report.error < 1e-10


def loss(p, t):
    logits = model(p, t[:, :-1])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), t[:, 1:, None], -1))


def test_a_loss_with_its_gradient_as_the_function():
    """Gradients by recentered leaves are outputs; the leaves' shift has to be unseen by them, too."""
    with jax.numpy_rank_promotion("allow"):
        out = convert(jax.value_and_grad(loss), model_params(), tokens(), partial=True)
        print(out.report)
        assert out.report.error < 1e-10
        out = convert(
            lambda p, t: jax.grad(lambda x: jnp.sum(model({**p, "embed": x}, t)))(p["embed"]),
            model_params(),
            tokens(),
            partial=True,
        )
        print(out.report)


def test_a_training_step_as_the_function():
    def step(p, t):
        value, grads = jax.value_and_grad(loss)(p, t)
        return jax.tree.map(lambda a, g: a - 0.1 * g, p, grads), value

    with jax.numpy_rank_promotion("allow"):
        out = convert(step, model_params(), tokens(), partial=True)
        print(out.report)
        assert out.report.error < 1e-10
