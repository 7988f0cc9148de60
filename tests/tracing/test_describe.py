"""The description that is found: complete, strict, and good for the transforms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_linen import GPT, D, ViT, build, images, tokens
from test_plain import normal

import prenorm_jax as pn
from conftest import shaken, widened, worst
from prenorm_jax.tracing import ConversionError, convert, describe, trace


@pytest.mark.parametrize(
    ("model", "x"),
    [(GPT(scan=True), tokens()), (GPT(tied=True), tokens()), (ViT(registers=2, layer_scale=True), images())],
    ids=["scan", "tied", "vit"],
)
def test_transforms_follow_a_found_description(model, x):
    params = shaken(widened(build(model, x)))
    branch = trace(model.apply, params, x)
    out = convert(model.apply, params, x, verify=False)
    new = pn.to_pre_rmsnorm(params, branch)
    wanted = jax.jit(model.apply)(params, x)
    assert worst(wanted, out.fn(new, x)) < 1e-10
    assert worst(wanted, out.fn(pn.fold_affine(params, branch), x)) > 1e-4
    assert worst(wanted, jax.jit(model.apply)(pn.fold_affine(params, branch), x)) < 1e-10


def test_gpt_is_described_leaf_by_leaf():
    model = GPT()
    branch = trace(model.apply, widened(build(model, tokens())), tokens())
    assert branch.width == 8
    assert branch.others == ("params/Dense_0/kernel",)
    assert {w.leaf: w.axis for w in branch.writers}["params/block0/attn/out/kernel"] == -1
    first = next(n for n in branch.norms if n.scale == "params/block0/ln1/scale")
    assert first.eps == pytest.approx(1e-6)
    assert {(r.kernel, r.axis, r.bias) for r in first.readers} == {
        (f"params/block0/attn/{k}/kernel", -3, f"params/block0/attn/{k}/bias") for k in ("query", "key", "value")
    }
    last = next(n for n in branch.norms if n.scale == "params/final/scale")
    assert "can take no bias" in last.keep


def test_layer_scale_is_its_writers():
    """Vectors (d,) become their writers' scale: recentering then is convert's."""
    x = normal(2, 4, D)
    params = {"in": normal(D, D), "up": normal(D, D), "down": normal(D, D), "ls": normal(D), "head": normal(D, 3)}
    fn = residual_with_layer_scale
    branch = trace(fn, params, x)
    assert {w.leaf: w.scale for w in branch.writers} == {"in": None, "down": "ls"}
    out = convert(fn, params, x)
    new = pn.to_pre_rmsnorm(params, branch)
    assert worst(out.params, new) < 1e-12
    assert worst(fn(params, x), fn(new, x)) < 1e-10
    bare = dataclasses.replace(
        branch, writers=[dataclasses.replace(w, scale=None) for w in branch.writers], others=["ls"]
    )
    assert worst(fn(params, x), out.fn(pn.to_pre_rmsnorm(params, bare), x)) > 1e-4


def residual_with_layer_scale(p, x):
    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    x = x @ p["in"]
    x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"] * p["ls"][None, None]
    return norm(x) @ p["head"]


def affine_norm(x, p):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * p["s"][None, None] + p["b"][None, None]


def sandwich(p, x):
    x = x @ p["in"]
    x = x + affine_norm(jax.nn.gelu(affine_norm(x, p["n1"]) @ p["up"] + p["up_b"][None, None]) @ p["down"], p["n2"])
    return affine_norm(x, p["nf"]) @ p["head"] + p["head_b"][None, None]


def norm_of_a_norm(p, x):
    x = x @ p["in"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) + p["n2"]["b"][None, None]
    return affine_norm(x, p["nf"]) @ p["head"] + p["head_b"][None, None]


@pytest.mark.parametrize("activations", ["pays", "always", "never"])
@pytest.mark.parametrize("fn", [sandwich, norm_of_a_norm])
def test_a_kept_norms_bias_may_be_a_writer(fn, activations):
    params = {"in": normal(5, D), "up": normal(D, D), "up_b": normal(D), "down": normal(D, D), "head": normal(D, 3)}
    params |= {"head_b": normal(3), **{k: {"s": normal(D), "b": normal(D)} for k in ("n1", "n2", "nf")}}
    x = normal(2, 4, 5)
    branch = trace(fn, params, x, activations=activations)
    roles = [*(w.leaf for w in branch.writers), *(n.bias for n in branch.norms)]
    assert roles.count("n2/b") == 1
    for transform in (pn.fold_affine, pn.recenter, pn.to_pre_rmsnorm):
        new = transform(params, branch)
        assert worst(fn(params, x), fn(new, x)) < 1e-10
    out = convert(fn, params, x, activations=activations)
    assert worst(fn(params, x), out.fn(new, x)) < 1e-10
    assert worst(fn(params, x), out.fn(params, x)) > 1e-4


@pytest.mark.parametrize(
    ("vector", "fits"), [((8,), True), ((1, 1, 8), True), ((3, 8), True), ((8, 3), False), ((2, 8), False)]
)
def test_vectors_that_a_description_knows(vector, fits):
    assert describe._lines_up(vector, (3, 5, 8), -1) == fits


def test_main_branches_of_several_widths():
    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def fn(p, x):
        y = x @ p["in"]
        y = y + jnp.tanh(norm(y) @ p["up"]) @ p["down"]
        z = norm(y) @ p["wider"]
        z = z + jnp.tanh(norm(z) @ p["up2"]) @ p["down2"]
        return norm(z) @ p["head"]

    shapes = {
        "in": (5, 4),
        "up": (4, 7),
        "down": (7, 4),
        "wider": (4, 6),
        "up2": (6, 7),
        "down2": (7, 6),
        "head": (6, 3),
    }
    params, x = {k: normal(*s) for k, s in shapes.items()}, normal(2, 5)
    with pytest.raises(ConversionError, match='width="each"'):
        trace(fn, params, x)
    narrow, wide = trace(fn, params, x, width="each")
    assert [w.leaf for w in narrow.writers] == ["down", "in"]
    assert [w.leaf for w in wide.writers] == ["down2", "wider"]
    out = convert(fn, params, x)
    new = pn.recenter(pn.recenter(params, narrow), wide)
    assert worst(out.params, new) < 1e-12
    assert worst(fn(params, x), out.fn(new, x)) < 1e-10
    assert worst(fn(params, x), out.fn(pn.recenter(params, narrow), x)) > 1e-4


def test_nothing_found_is_an_error():
    with pytest.raises(ConversionError, match="no main branch"):
        trace(lambda p, x: x @ p, jnp.ones((3, 3)), jnp.ones((2, 3)))
