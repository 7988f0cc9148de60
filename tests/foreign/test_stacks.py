"""Layers stacked along the second axis of every leaf, as `nn.scan(variable_axes={"params": 1})` has them: norm scales are (d, layers)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import prenorm_jax as pn
from prenorm_jax.paths import leaves, with_leaves

D, F, LAYERS, V = 6, 10, 3, 7
TOKENS = jnp.arange(10).reshape(2, 5) % V


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def shaken(tree):
    rng = np.random.default_rng(0)
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in leaves(tree).items()}
    return with_leaves(tree, {path: jnp.asarray(a + 0.3 * rng.normal(size=a.shape) + 0.2) for path, a in flat.items()})


def described(gained=None, **options):
    readers = [pn.Reader("cells/query", -3, bias=gained), pn.Reader("cells/up/kernel", -2, bias="cells/up/bias")]
    return pn.MainBranch(
        [pn.Writer(f"cells/down/{name}", scale="cells/layer_scale") for name in ("kernel", "bias")]
        + [pn.Writer("embed/embedding"), pn.Writer("cells/out", -2)],
        [
            pn.Norm(readers, scale="cells/norm/scale", bias="cells/norm/bias", eps=1e-5, keep=None if gained else "q"),
            pn.Norm([pn.Reader("head/kernel")], scale="norm/scale", eps=1e-6),
        ],
        width=D,
        stacked={"cells/**": 1},
        **options,
    )


def named(*axes):
    return nn.with_partitioning(nn.initializers.normal(1.0), axes)


class Cell(nn.Module):
    """Attention over tokens with a query of rank 3 alone, and an output kernel whose main-branch axis is not the last."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        query = self.param("query", named("embed", "heads", None), (h.shape[-1], 2, 2))
        out = self.param("out", named("heads", "embed", None), (2, self.width, 2))
        q = jnp.einsum("btd,dhk->bthk", h, query)
        x = x + jnp.einsum("bthk,hdk->btd", jnp.cumsum(jnp.tanh(q), 1), out)
        y = nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(F, name="up")(h)))
        return x + self.param("layer_scale", nn.initializers.ones, (self.width,))[None, None] * y, None


class Model(nn.Module):
    width: int = D

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, self.width, name="embed")(tokens)
        scan = nn.scan(
            Cell,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(self.width, name="cells")(x, None)
        return nn.Dense(V, name="head")(nn.LayerNorm(epsilon=1e-6, use_bias=False, name="norm")(x))


def linen_params(model):
    with jax.enable_x64(False):
        params = model.init(jax.random.key(0), np.asarray(TOKENS, np.int32))["params"]
    return shaken(params)


def gap(found, expected):
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def test_layers_stacked_on_axis_one_in_linen():
    model = Model()
    params, fn = linen_params(model), lambda p, t: model.apply({"params": p}, t)
    expected, spec = fn(params, TOKENS), described(others=["head/bias"])
    spec.check(fn, params, TOKENS)

    def run(params, model, **form):
        with nn.intercept_methods(pn.intercept_norms(spec, **form)):
            return model.apply({"params": params}, TOKENS)

    rms = pn.to_pre_rmsnorm(params, spec)
    assert rms["cells"]["query"].names == params["cells"]["query"].names == ("embed", "layers", "heads", None)
    assert rms["cells"]["norm"]["scale"].shape == (D, LAYERS)
    assert gap(run(rms, model), expected) < 1e-10
    assert gap(run(params, model, recentered=False), expected) > 1e-3
    for basis in ("reflect", "drop"):
        compact = pn.compress(params, spec, basis)
        found = run(compact, Model(width=D - 1), norm="pre_crmsnorm", basis=basis)
        assert gap(found, expected) < 1e-10
        assert gap(fn(pn.to_pre_ln(compact, spec, basis), TOKENS), expected) < 1e-10
    manifest = pn.manifest(compact, spec, "pre_crmsnorm", basis="drop", computation="float64")
    pn.check_manifest(manifest, compact, spec)
    gaining = pn.to_pre_rmsnorm(params, described(gained="cells/query_bias", others=["head/bias"]))
    assert gaining["cells"]["query_bias"].value.shape == (2, LAYERS, 2)
    assert gaining["cells"]["query_bias"].names == ("heads", "layers", None)
    with pytest.raises(pn.LayoutError, match=r"found several: .*stacked on another axis"):
        pn.recenter(params, pn.MainBranch(spec.writers, spec.norms, spec.others, D))


class NNXCell(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.query = nnx.Param(jax.random.normal(rngs.params(), (D, 2, 2)))
        self.out = nnx.Param(jax.random.normal(rngs.params(), (2, D, 2)))
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        h = self.norm(x)
        q = jnp.einsum("btd,dhk->bthk", h, self.query[...])
        x = x + jnp.einsum("bthk,hdk->btd", jnp.cumsum(jnp.tanh(q), 1), self.out[...])
        return x + self.layer_scale[...][None, None] * self.down(nnx.gelu(self.up(h)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(V, D, param_dtype=float, rngs=rngs), nnx.Linear(D, V, rngs=rngs)
        self.norm = nnx.LayerNorm(D, epsilon=1e-6, use_bias=False, rngs=rngs)
        cells = [nnx.split(NNXCell(rngs)) for _ in range(LAYERS)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a, 1), *(state for _, state in cells))
        self.cells = nnx.merge(cells[0][0], stacked)

    def __call__(self, tokens):
        x = nnx.scan(lambda x, cell: cell(x), in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)(
            self.embed(tokens), self.cells
        )
        return self.head(self.norm(x))


def test_layers_stacked_on_axis_one_in_nnx():
    model = NNXModel(nnx.Rngs(0))
    nnx.update(model, shaken(nnx.state(model, nnx.Param)))
    expected, spec = model(TOKENS), described(others=["head/bias"])
    graph, state = nnx.split(model)
    spec.check(lambda state, tokens: nnx.merge(graph, state)(tokens), state, TOKENS)
    assert gap(pn.swap_norms(model, spec)(TOKENS), expected) < 1e-10
    for basis in ("reflect", "drop"):
        for layout in ("compact", "packed"):
            narrow = pn.swap_norms(model, spec, norm="pre_crmsnorm", basis=basis, layout=layout)
            assert narrow.cells.out.shape == (2, LAYERS, D - (layout == "compact"), 2)
            assert gap(narrow(TOKENS), expected) < 1e-10


def test_parameters_that_were_not_recentered_are_refused():
    model = Model()
    params, spec = linen_params(model), described(others=["head/bias"])
    with nn.intercept_methods(pn.intercept_norms(spec)):
        with pytest.raises(pn.LayoutError, match=r"only a recentered model has a Pre-LN equal"):
            model.apply({"params": pn.fold_affine(params, spec)}, TOKENS)
        model.apply({"params": pn.recenter(params, spec)}, TOKENS)


class Insists(nn.Module):
    """A reader that asks for its bias, come what may."""

    width: int = D

    @nn.compact
    def __call__(self, tokens):
        h = nn.LayerNorm(epsilon=1e-6, name="norm")(nn.Embed(V, self.width, name="embed")(tokens))
        return OwnLinear(name="head")(h)


class OwnLinear(nn.Module):
    @nn.compact
    def __call__(self, h):
        bias = self.param("b", nn.initializers.zeros, (V,))
        return h @ self.param("w", nn.initializers.normal(1.0), (h.shape[-1], V)) + bias[None, None]


def test_a_bias_that_a_module_insists_on_is_named():
    model, norm = Insists(), pn.Norm([pn.Reader("head/w", bias="head/b")], scale="norm/scale", bias="norm/bias")
    params, spec = linen_params(model), pn.MainBranch([pn.Writer("embed/embedding")], [norm])
    form = {"norm": "pre_crmsnorm", "layout": "packed"}
    packed = pn.compress(params, spec, layout="packed")
    with (
        nn.intercept_methods(pn.intercept_norms(spec, **form)),
        pytest.raises(pn.LayoutError, match=r"head/b: a OwnLinear asks for this bias.*layout=\"compact\""),
    ):
        model.apply({"params": packed}, TOKENS)
