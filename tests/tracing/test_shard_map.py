"""`shard_map` is entered: data axes and model axes may be sharded; a feature axis that devices share keeps its norm, with the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_plain import normal

from prenorm_jax.tracing import convert

D, F, B, L, V = 8, 8, 4, 2, 6


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


def norm(x, p):
    m = x.mean(-1, keepdims=True)
    v = jnp.mean((x - m) ** 2, -1, keepdims=True)
    return (x - m) * jax.lax.rsqrt(v + 1e-5) * p["scale"][None, None] + p["bias"][None, None]


def affine():
    return {"scale": normal(D), "bias": normal(D)}


def parameters():
    block = {"ln": affine(), "up": normal(D, F), "up_b": normal(F), "down": normal(F, D), "down_b": normal(D)}
    return {"in": normal(5, D), "block": block, "ln": affine(), "head": normal(D, V)}


REPLICATED = {
    "in": P(),
    "block": dict.fromkeys(("up", "up_b", "down", "down_b"), P()),
    "ln": {"scale": P(), "bias": P()},
    "head": P(),
}
REPLICATED["block"]["ln"] = REPLICATED["ln"]
MEGATRON = {
    **REPLICATED,
    "block": {**REPLICATED["block"], "up": P(None, "model"), "up_b": P("model"), "down": P("model", None)},
}


def local(p, x, reduce=lambda y: y):
    x = x @ p["in"]
    h = jax.nn.gelu(norm(x, p["block"]["ln"]) @ p["block"]["up"] + p["block"]["up_b"][None, None])
    x = x + reduce(h @ p["block"]["down"]) + p["block"]["down_b"][None, None]
    return norm(x, p["ln"]) @ p["head"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_batches_over_devices(check, check_vma):
    fn = jax.shard_map(local, mesh=mesh(), in_specs=(REPLICATED, P("data")), out_specs=P("data"), check_vma=check_vma)
    check(fn, parameters(), normal(B, L, 5), sites=2, grads=True)


def test_a_block_split_over_devices(check):
    """Hidden units are sharded and their products summed over devices: features are whole everywhere. The norm folds, too."""

    def run(p, x):
        return local(p, x, lambda y: jax.lax.psum(y, "model"))

    fn = jax.shard_map(run, mesh=mesh(), in_specs=(MEGATRON, P("data")), out_specs=P("data"))
    out = check(fn, parameters(), normal(B, L, 5), sites=2)
    assert ("block/down", (-1,)) in out.report.leaves


def test_shardings_in_types():
    """An explicit mesh: indexing switches to automatic axes for a few equations, which verification has to do, too."""
    explicit = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def fn(p, t):
        x = p["table"].at[t].get(out_sharding=P("data", None, None))
        h = jax.nn.gelu(norm(x, p["block"]["ln"]) @ p["block"]["up"] + p["block"]["up_b"][None, None])
        down = jnp.einsum("blf,fd->bld", h, p["block"]["down"], out_sharding=P("data", None, None))
        return norm(x + down + p["block"]["down_b"][None, None], p["ln"]) @ p["head"]

    params = {**parameters(), "table": normal(V, D)}
    params.pop("in")
    with jax.set_mesh(explicit):
        params = jax.tree.map(lambda a: jax.device_put(a, P()), params)
        params["block"]["up"] = jax.device_put(params["block"]["up"], P(None, "model"))
        params["block"]["down"] = jax.device_put(params["block"]["down"], P("model", None))
        tokens = jax.device_put(jnp.arange(B * L).reshape(B, L) % V, P("data"))
        out = convert(fn, params, tokens)
        assert out.report.converted == 2
        assert out.report.error < 1e-10
        found, wanted = out.fn(out.params, tokens), fn(params, tokens)
        assert found.sharding == wanted.sharding
        assert jnp.allclose(found, wanted, atol=1e-10)


def test_features_gathered_from_devices(check):
    def run(p, x):
        return jax.lax.all_gather(local(p, x), "data", axis=0, tiled=True)

    fn = jax.shard_map(run, mesh=mesh(), in_specs=(REPLICATED, P("data")), out_specs=P(), check_vma=False)
    check(fn, parameters(), normal(B, L, 5), sites=2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_recentering_inside(check, check_vma):
    """A new equation would have to say what varies over devices, where `shard_map` checks that."""

    def run(p, x):
        y = jnp.maximum(x @ p["in"], 0.0)
        return (norm(y, p["block"]["ln"]) + norm(2 * y, p["ln"])) @ p["head"]

    fn = jax.shard_map(run, mesh=mesh(), in_specs=(REPLICATED, P("data")), out_specs=P("data"), check_vma=check_vma)
    if check_vma:
        out = check(fn, parameters(), normal(B, L, 5), sites=0, kept=2, partial=True)
        assert all("check_vma=False" in s.reason for s in out.report.sites)
    else:
        check(fn, parameters(), normal(B, L, 5), sites=2, added=1)


def test_a_norm_over_features_that_devices_share(check):
    """Each device holds a part of the features: a local mean is a group's, and the mean over devices is no sum that one of them takes."""

    def across(p, x):
        y = x @ p["in"]
        m = jax.lax.pmean(y.mean(-1, keepdims=True), "model")
        v = jax.lax.pmean(((y - m) ** 2).mean(-1, keepdims=True), "model")
        return jax.lax.psum((y - m) * jax.lax.rsqrt(v + 1e-5) @ p["head"], "model")

    def within(p, x):
        y = x @ p["in"]
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
        return jax.lax.psum(y @ p["head"], "model")

    params = {"in": normal(5, D), "head": normal(D, V)}
    specs = ({"in": P(None, "model"), "head": P("model")}, P("data"))
    for run in (across, within):
        fn = jax.shard_map(run, mesh=mesh(), in_specs=specs, out_specs=P("data"))
        out = check(fn, params, normal(B, L, 5), sites=0, kept=1, partial=True)
        assert "sharded over devices" in out.report.sites[0].reason or "across devices" in out.report.sites[0].reason, (
            out.report
        )
