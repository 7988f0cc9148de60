"""Any description, any shapes, any dtype, any order: properties of the transforms, on functions that a description itself defines.

The function is the plainest that has this main branch: activations are contracted with all writers and summed, each norm normalises that
sum, its readers are what is returned. It is written in numpy, apart from the package. Then whole architectures, in Linen and in NNX.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from architecture import Config, describe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import APIS, TRANSFORMS, example, worst

import prenorm_jax as pn
from prenorm_jax import MainBranch, Norm, Reader, Writer, bases
from prenorm_jax.paths import leaves

pytestmark = pytest.mark.slow

EXACT = 1e-10
EPS = 3e-2
LAYERS = 2
seeded = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
sizes = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf's shape around its axis of the main branch; `stacked`: with an axis of layers in front."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    stacked: bool

    @property
    def axis(self):
        return -1 - len(self.after)

    def shape(self, *middle):
        return (*([LAYERS] if self.stacked else []), *self.before, *middle, *self.after)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A random main branch: its leaves, and where they are described."""

    width: int
    writers: tuple[tuple[Leaf, bool], ...]  # with a LayerScale or without
    norms: tuple[
        tuple[bool, bool, bool, tuple[tuple[Leaf, str], ...]], ...
    ]  # scale, bias, kept, readers with their biases

    @property
    def spec(self):
        return MainBranch(
            [
                Writer(f"writer{k}/kernel", leaf.axis, scale=f"writer{k}/scale" if scaled else None)
                for k, (leaf, scaled) in enumerate(self.writers)
            ],
            [
                Norm(
                    [
                        Reader(
                            f"norm{k}/reader{j}/kernel",
                            leaf.axis,
                            None if bias == "none" else f"norm{k}/reader{j}/bias",
                        )
                        for j, (leaf, bias) in enumerate(readers)
                    ],
                    f"norm{k}/scale",
                    f"norm{k}/bias",
                    keep="it is" if kept else None,
                )
                for k, (_, _, kept, readers) in enumerate(self.norms)
            ],
            width=self.width,
        )

    def params(self, seed=0, dtype=np.float64):
        rng = np.random.default_rng(seed)
        d, tree = self.width, {}

        def random(*shape):
            return (0.5 + rng.normal(size=shape)).astype(dtype)

        for k, (leaf, scaled) in enumerate(self.writers):
            tree[f"writer{k}"] = {"kernel": random(*leaf.shape(d))}
            if scaled:
                tree[f"writer{k}"]["scale"] = random(*leaf.shape()[: leaf.stacked], d)
        for k, (scale, bias, _, readers) in enumerate(self.norms):
            layers = [LAYERS] if readers[0][0].stacked else []
            tree[f"norm{k}"] = {
                name: random(*layers, d) for name, is_there in (("scale", scale), ("bias", bias)) if is_there
            }
            if scale:
                tree[f"norm{k}"]["scale"][..., 0] = 0
            for j, (leaf, has) in enumerate(readers):
                tree[f"norm{k}"][f"reader{j}"] = {"kernel": random(*leaf.shape(d))}
                if has == "there":
                    tree[f"norm{k}"][f"reader{j}"]["bias"] = random(*leaf.shape())
        return tree

    def run(self, params, normalise, expand=lambda n: n):
        """What the readers return, layer by layer. expand: coordinates of a main branch -> Pre-LN ones, for the norms that are kept."""
        flat = {path: np.asarray(leaf).astype(np.float64) for path, leaf in leaves(params).items()}
        x = 0
        for k, (leaf, scaled) in enumerate(self.writers):
            for layer in range(LAYERS if leaf.stacked else 1):
                at = np.index_exp[layer] if leaf.stacked else ()
                kernel = np.moveaxis(flat[f"writer{k}/kernel"][at], leaf.axis, -1)
                tokens = np.cos(np.arange(3 * kernel[..., 0].size) + k + 2 * layer).reshape(3, *kernel.shape[:-1])
                written = np.tensordot(tokens, kernel, kernel.ndim - 1)
                x = x + (written * flat[f"writer{k}/scale"][at] if scaled else written)
        outputs = []
        for k, (_, _, kept, readers) in enumerate(self.norms):
            for j, (leaf, _) in enumerate(readers):
                for layer in range(LAYERS if leaf.stacked else 1):
                    at = np.index_exp[layer] if leaf.stacked else ()
                    n = expand(normalise(x)) if kept else normalise(x)
                    n = n * flat[f"norm{k}/scale"][at] if f"norm{k}/scale" in flat else n
                    n = n + flat[f"norm{k}/bias"][at] if f"norm{k}/bias" in flat else n
                    y = np.tensordot(
                        n,
                        flat[f"norm{k}/reader{j}/kernel"][at],
                        [[-1], [flat[f"norm{k}/reader{j}/kernel"][at].ndim + leaf.axis]],
                    )
                    bias = flat.get(f"norm{k}/reader{j}/bias")
                    outputs.append(y if bias is None else y + bias[at][None])
        return outputs


@st.composite
def branches(draw):
    def leaf(stacked):
        return Leaf(draw(sizes), draw(sizes), stacked)

    def norm():
        scale, bias, kept, stacked = (draw(st.booleans()) for _ in range(4))
        places = ["none", "there", "gained"] if kept or not bias else ["there", "gained"]
        readers = [(leaf(stacked), draw(st.sampled_from(places))) for _ in range(draw(st.integers(1, 2)))]
        return scale, bias, kept, tuple(readers)

    writers = [(leaf(draw(st.booleans())), draw(st.booleans())) for _ in range(draw(st.integers(1, 3)))]
    return Branch(draw(st.integers(3, 6)), tuple(writers), tuple(norm() for _ in range(draw(st.integers(1, 3)))))


def centred(x):
    return x - x.mean(axis=-1, keepdims=True)


def rms(x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)


def crms(basis):
    def normalise(z):
        power = (z * z).sum(axis=-1, keepdims=True) + (z.sum(axis=-1, keepdims=True) ** 2 if basis == "drop" else 0)
        return z / np.sqrt(power / (z.shape[-1] + 1) + EPS)

    return normalise


def packed(basis):
    return lambda z: np.concatenate([crms(basis)(z[..., :-1]), np.ones_like(z[..., :1])], axis=-1)


def expanded(basis, lanes=slice(None)):
    return lambda n: bases.basis_maps(basis)["back_writer"](n[..., lanes], -1)


CHARTS = {
    "pre_ln": (lambda x: rms(centred(x)),),
    "pre_rmsnorm": (rms,),
    **{f"compact {basis}": (crms(basis), expanded(basis)) for basis in ("reflect", "drop")},
    **{f"packed {basis}": (packed(basis), expanded(basis, slice(None, -1))) for basis in ("reflect", "drop")},
}
FULL = {
    **{
        f"compress {basis}": (functools.partial(pn.compress, basis=basis), f"compact {basis}")
        for basis in ("reflect", "drop")
    },
    "to_pre_rmsnorm": (pn.to_pre_rmsnorm, "pre_rmsnorm"),
    "recenter": (pn.recenter, "pre_rmsnorm"),
}
MOVES = {
    "pre_ln": {"fold_affine": (pn.fold_affine, "pre_ln"), **FULL},
    "pre_rmsnorm": {
        "fold_affine": (pn.fold_affine, "pre_rmsnorm"),
        "zero_mean_gauge": (pn.zero_mean_gauge, "pre_rmsnorm"),
        "to_pre_ln": (pn.to_pre_ln, "pre_ln"),
        **FULL,
    },
    **{
        f"compact {basis}": {
            "fold_affine": (pn.fold_affine, f"compact {basis}"),
            "decompress": (functools.partial(pn.decompress, basis=basis), "pre_rmsnorm"),
            "to_pre_ln": (functools.partial(pn.to_pre_ln, basis=basis), "pre_ln"),
            "pack": (pn.pack, f"packed {basis}"),
        }
        for basis in ("reflect", "drop")
    },
    **{f"packed {basis}": {"unpack": (pn.unpack, f"compact {basis}")} for basis in ("reflect", "drop")},
}


def gap(actual, expected):
    assert len(actual) == len(expected)
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1) for a, b in zip(actual, expected, strict=True))


@given(branches(), st.data())
@seeded(max_examples=300)
def test_any_order_of_transforms_keeps_the_function(branch, data):
    params, chart, spec = branch.params(), "pre_ln", branch.spec
    expected = branch.run(params, *CHARTS["pre_ln"])
    way = []
    for _ in range(data.draw(st.integers(1, 5))):
        moves = dict(MOVES[chart])
        if any(has == "none" for *_, kept, readers in branch.norms if not kept for _, has in readers):
            moves.pop("unpack", None)
        if not moves:
            break
        way.append(data.draw(st.sampled_from(sorted(moves))))
        change, chart = moves[way[-1]]
        before = {path: leaf.copy() for path, leaf in leaves(params).items()}
        changed = change(params, spec)
        assert all(np.array_equal(leaf, before[path]) for path, leaf in leaves(params).items()), "the input was changed"
        params = changed
        assert gap(branch.run(params, *CHARTS[chart]), expected) <= EXACT, way


def test_a_wrong_chart_is_seen():
    leaf = Leaf((2,), (), False)
    branch = Branch(4, ((leaf, True),), ((True, True, False, ((Leaf((), (3,), False), "there"),)),))
    params = branch.params()
    expected = branch.run(params, *CHARTS["pre_ln"])
    for chart in ("pre_rmsnorm", "packed reflect"):
        assert gap(branch.run(params, *CHARTS[chart]), expected) > 1e-3
    compact = pn.compress(params, branch.spec, "drop")
    assert gap(branch.run(compact, *CHARTS["compact drop"]), expected) <= EXACT
    assert gap(branch.run(compact, *CHARTS["compact reflect"]), expected) > 1e-3


def same(actual, expected, tolerance=1e-12):
    actual, expected = leaves(actual), leaves(expected)
    assert set(actual) == set(expected)
    for path, leaf in actual.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=tolerance, atol=tolerance, err_msg=path)


@given(branches(), st.sampled_from(["reflect", "drop"]))
@seeded(max_examples=150)
def test_composition_and_inverses(branch, basis):
    params, spec = branch.params(), branch.spec
    folded, recentered = pn.fold_affine(params, spec), pn.recenter(params, spec)
    rms_params, compact = pn.to_pre_rmsnorm(params, spec), pn.compress(params, spec, basis)
    for once, change in (
        (folded, pn.fold_affine),
        (recentered, pn.recenter),
        (rms_params, pn.to_pre_rmsnorm),
        (pn.zero_mean_gauge(rms_params, spec), pn.zero_mean_gauge),
    ):
        same(change(once, spec), once)
    same(pn.recenter(folded, spec), rms_params)
    same(pn.fold_affine(recentered, spec), rms_params)
    same(pn.compress(rms_params, spec, basis), compact)
    back = pn.decompress(compact, spec, basis)
    same(pn.compress(back, spec, basis), compact)
    same(pn.zero_mean_gauge(back, spec), pn.zero_mean_gauge(rms_params, spec))
    same(pn.to_pre_ln(compact, spec, basis), back)
    with pytest.raises(pn.LayoutError, match="lanes; expected"):
        pn.compress(compact, spec, basis)
    if all(has != "none" for *_, kept, readers in branch.norms if not kept for _, has in readers):
        unpacked = leaves(pn.unpack(pn.pack(compact, spec), spec))
        expected = leaves(compact)
        gained = {path: leaf for path, leaf in unpacked.items() if path not in expected}
        assert not any(np.any(leaf) for leaf in gained.values())
        same({path: leaf for path, leaf in unpacked.items() if path in expected}, expected)


@given(branches(), st.sampled_from([jnp.bfloat16, np.float16, np.float32]), st.sampled_from(list(TRANSFORMS)))
@seeded(max_examples=150)
def test_storage_is_rounded_once(branch, dtype, form):
    stored, spec = branch.params(dtype=dtype), branch.spec
    wide = branch.params()
    for name, group in stored.items():
        wide[name] = _widened(group)
    steps = {"packed": [pn.to_pre_crmsnorm, pn.pack]}.get(form, [TRANSFORMS[form]])
    for count, step in enumerate(steps):
        wide, stored = step(_widened(stored) if count else wide, spec), step(stored, spec)
        exact, actual = leaves(wide), leaves(stored)
        assert set(exact) == set(actual)
        limits = jnp.finfo(dtype)
        for path, leaf in actual.items():
            assert leaf.dtype == dtype
            half = float(limits.eps) / 2 * np.abs(exact[path]) * (1 + 1e-9) + float(limits.smallest_subnormal)
            assert np.all(np.abs(leaf.astype(np.float64) - exact[path]) <= half), path


def _widened(tree):
    return {key: _widened(leaf) if isinstance(leaf, dict) else leaf.astype(np.float64) for key, leaf in tree.items()}


@st.composite
def configs(draw):
    """Any of the foreign Transformers."""
    patches, mlp = draw(st.booleans()), draw(st.sampled_from(["plain", "gated", "experts"]))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (2, 1), (4, 2)]))
    tied = not patches and draw(st.booleans())
    embed_norm = not tied and draw(st.booleans())
    layer_scale = draw(st.booleans())
    return Config(
        width=(width := draw(st.integers(5, 9))),
        nominal=width,
        depth=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        scan=draw(st.booleans()),
        norm_scale=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        reader_bias=draw(st.booleans()),
        parallel=draw(st.booleans()),
        qkv=draw(st.sampled_from(["heads", "flat"])),
        qk_norm=draw(st.booleans()),
        mlp=mlp,
        patches=patches,
        extra=tuple(draw(st.sets(st.sampled_from(["class", "distillation", "register"])))),
        positions=draw(st.sampled_from(["none", "learned", "constant"])),
        positions_last=draw(st.booleans()),
        segments=draw(st.booleans()),
        layer_scale=layer_scale,
        lora=draw(st.integers(0, 2)),
        tied=tied,
        embed_norm=embed_norm,
        pool=draw(st.sampled_from(["none", "first", "mean", "mean after"])),
        heads_read=draw(st.integers(1, 2)),
    )


@pytest.mark.parametrize("api", APIS)
@given(configs(), st.sampled_from(["rms", "reflect", "drop", "packed"]))
@seeded(max_examples=3)
def test_any_architecture(api, c, form):
    if c.mlp == "experts" and not c.reader_bias and (c.norm_bias or form == "packed"):
        c = dataclasses.replace(c, mlp="gated")  # experts declare their biases: they can't gain one
    model, x, spec = APIS[api](c), example(c), describe(c)
    params = model.params(x)
    expected = model.run(params, x)
    assert worst(model.converted([spec], form)(params, x), expected) <= EXACT
    assert worst(model.control(params, [spec], x), expected) > 1e-3
