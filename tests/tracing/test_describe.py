"""The description that is found: complete, strict, and good for the transforms."""

import jax
import jax.numpy as jnp
import pytest
from test_linen import GPT, ViT, build, images, tokens

import prenorm_jax as pn
from conftest import shaken, widened, worst
from prenorm_jax.tracing import ConversionError, convert, trace


@pytest.mark.parametrize(
    ("model", "x"),
    [(GPT(), tokens()), (GPT(scan=True), tokens()), (GPT(tied=True), tokens()), (ViT(registers=2), images())],
    ids=["gpt", "scan", "tied", "vit"],
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


def test_layer_scale_is_refused():
    model = ViT(layer_scale=True)
    with pytest.raises(ConversionError, match="params/block0/ls1"):
        trace(model.apply, build(model, images()), images())


def test_nothing_found_is_an_error():
    with pytest.raises(ConversionError, match="no main branch"):
        trace(lambda p, x: x @ p, jnp.ones((3, 3)), jnp.ones((2, 3)))
