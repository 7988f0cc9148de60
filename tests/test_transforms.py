"""Each transform preserves the function by itself, with the norm of its chart; it is pure, jittable, differentiable, keeps storage dtypes
and rounds once, never divides by gamma, and refuses a tree of another chart.

The model is written here in numpy's words, apart from `models`: two residual layers (one with a rank 3 reader and writer, as attention
has, one with (out, in) kernels), an embedding with a mean and a head without a bias.
"""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import prenorm_jax as pn
from prenorm_jax import MainBranch, Norm, Reader, Writer, precision
from prenorm_jax.paths import leaves, with_leaves

EPS = 1e-2  # large enough that a wrong eps shows
EXACT = 1e-12  # float64, relative to the largest value of the result
WIDTH = 8
SPEC = MainBranch(
    [
        Writer("embed"),
        Writer("heads/out/kernel"),
        Writer("heads/out/bias"),
        Writer("mlp/down/kernel", axis=-2),
        Writer("mlp/down/bias"),
    ],
    [
        Norm([Reader("heads/in/kernel", axis=-3, bias="heads/in/bias")], scale="norm1/scale", bias="norm1/bias"),
        Norm([Reader("mlp/up/kernel", axis=-1, bias="mlp/up/bias")], scale="norm2/scale", bias="norm2/bias"),
        Norm([Reader("head/kernel", bias="head/bias")], scale="final/scale", bias="final/bias"),
    ],
    others=["unrelated"],
    width=WIDTH,
)
NORMS = {
    "layer": pn.layer_norm,
    "rms": pn.rms_norm,
    "reflect": pn.crms_norm,
    "drop": functools.partial(pn.crms_norm, basis="drop"),
    "packed reflect": pn.crms_norm_packed,
    "packed drop": functools.partial(pn.crms_norm_packed, basis="drop"),
}


def model(params, norm="layer", eps=EPS):
    """The function of a tree in any chart, on all tokens of its vocabulary."""
    norm = functools.partial(NORMS[norm], eps=eps)

    def bias(layer, y):
        return y + layer["bias"][None] if "bias" in layer else y

    def affine(name):
        return params.get(name, {}).get("scale"), params.get(name, {}).get("bias")

    x = params["embed"]
    n = norm(x, *affine("norm1"))
    heads = bias(params["heads"]["in"], jnp.einsum("nd,dhk->nhk", n, params["heads"]["in"]["kernel"]))
    x = bias(params["heads"]["out"], x + jnp.einsum("nhk,hkd->nd", jnp.tanh(heads), params["heads"]["out"]["kernel"]))
    n = norm(x, *affine("norm2"))
    x = bias(
        params["mlp"]["down"],
        x
        + jnp.tanh(bias(params["mlp"]["up"], n @ params["mlp"]["up"]["kernel"].T)) @ params["mlp"]["down"]["kernel"].T,
    )
    return bias(params["head"], norm(x, *affine("final")) @ params["head"]["kernel"])


def tree(width=WIDTH, dtype=np.float64, kind=np.asarray, seed=0):
    """Everything random, all means far from 0; gammas with a zero, a negative and a tiny entry."""
    rng = np.random.default_rng(seed)

    def normal(*shape, mean=0.3):
        return kind(np.asarray(mean + rng.normal(size=shape) / 2).astype(dtype))

    def norm():
        scale = 1 + rng.normal(size=width) / 2
        scale[:3] = np.array([0.0, -0.7, 1e-30])[: len(scale)]
        return {"scale": kind(scale.astype(dtype)), "bias": normal(width)}

    return {
        "embed": normal(9, width, mean=2.0),
        "norm1": norm(),
        "heads": {
            "in": {"kernel": normal(width, 2, 3), "bias": normal(2, 3)},
            "out": {"kernel": normal(2, 3, width), "bias": normal(width)},
        },
        "norm2": norm(),
        "mlp": {
            "up": {"kernel": normal(5, width), "bias": normal(5)},
            "down": {"kernel": normal(width, 5), "bias": normal(width)},
        },
        "final": norm(),
        "head": {"kernel": normal(width, 4)},
        "unrelated": kind(np.arange(3)),
    }


def chain(*steps, spec=SPEC):
    return lambda params: functools.reduce(lambda p, step: step(p, spec), steps, params)


drop = functools.partial(pn.compress, basis="drop")
undrop = functools.partial(pn.decompress, basis="drop")
packed_at_once = functools.partial(pn.compress, basis="drop", layout="packed")
CHARTS = {  # the transforms -> the norm of the chart in which they leave the tree
    "fold_affine": (chain(pn.fold_affine), "layer"),
    "recenter": (chain(pn.recenter), "layer"),
    "recenter, then rms": (chain(pn.recenter), "rms"),
    "to_pre_rmsnorm": (chain(pn.to_pre_rmsnorm), "rms"),
    "to_pre_rmsnorm, still layer": (chain(pn.to_pre_rmsnorm), "layer"),
    "zero_mean_gauge": (chain(pn.to_pre_rmsnorm, pn.zero_mean_gauge), "rms"),
    "strip_affine": (chain(pn.to_pre_rmsnorm, pn.strip_affine), "rms"),
    "compress reflect": (chain(pn.compress), "reflect"),
    "compress drop": (chain(drop), "drop"),
    "to_pre_crmsnorm of rms": (chain(pn.to_pre_rmsnorm, pn.to_pre_crmsnorm), "reflect"),
    "decompress reflect": (chain(pn.compress, pn.decompress), "rms"),
    "decompress drop": (chain(drop, undrop), "rms"),
    "pack reflect": (chain(pn.compress, pn.pack), "packed reflect"),
    "pack drop": (chain(drop, pn.pack), "packed drop"),
    "compress, packed at once": (chain(packed_at_once), "packed drop"),
    "unpack": (chain(pn.compress, pn.pack, pn.unpack), "reflect"),
    "to_pre_ln": (chain(pn.compress, pn.to_pre_ln), "layer"),
}
every_chart = pytest.mark.parametrize("chart", CHARTS)


def assert_near(actual, expected, tolerance=EXACT):
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


@every_chart
def test_it_preserves_the_function_with_the_norm_of_its_chart(chart):
    change, norm = CHARTS[chart]
    assert_near(jax.jit(functools.partial(model, norm=norm))(change(tree())), model(tree()))


def test_untransformed_weights_are_another_function_under_rms_norm():
    assert np.max(np.abs(model(tree(), "rms") - model(tree()))) > 1e-3
    assert np.max(np.abs(model(pn.fold_affine(tree(), SPEC), "rms") - model(tree()))) > 1e-3
    assert np.max(np.abs(model(pn.compress(tree(), SPEC), "drop") - model(tree()))) > 1e-3


@every_chart
def test_it_is_pure_and_jit_agrees_with_eager(chart, assert_same):
    change, _ = CHARTS[chart]
    for kind in (np.asarray, jnp.asarray):
        params = tree(kind=kind)
        eager = change(params)
        assert_same(params, tree(kind=kind))
        assert all(type(leaf) is type(params["embed"]) for leaf in jax.tree.leaves(eager))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(eager))
    if "strip" not in chart:
        assert eager["unrelated"] is params["unrelated"]
    assert_same(jax.jit(change)(params), eager, EXACT)


@every_chart
def test_its_gradient_is_that_of_the_pre_ln_function(chart, assert_same):
    change, norm = CHARTS[chart]
    params = {name: leaf for name, leaf in tree(kind=jnp.asarray).items() if name != "unrelated"}

    def loss(change, norm):
        def of(params):
            full = change({**params, "unrelated": np.arange(3)})
            return jnp.sum(jnp.sin(model(full, norm)))

        return jax.jit(jax.grad(of))(params)

    assert_same(
        loss(change, norm), loss(lambda p: p, "layer"), 1e-10
    )  # tiny gammas leave tiny gradients beside large ones


@pytest.mark.parametrize("name", ["fold_affine", "recenter", "zero_mean_gauge", "to_pre_rmsnorm"])
def test_twice_is_once(name, assert_same):
    change = getattr(pn, name)
    once = change(tree(), SPEC)
    assert_same(change(once, SPEC), once, EXACT)
    changed = [path for path, leaf in leaves(tree()).items() if not np.array_equal(leaf, leaves(once)[path])]
    assert changed  # it did something


def test_each_transform_touches_its_own_leaves_alone():
    def touched(change):
        new = leaves(change(tree(), SPEC))
        old = leaves(tree())
        return {path for path in new if path not in old or not np.array_equal(new[path], old[path])}

    writers = {"embed", "heads/out/kernel", "heads/out/bias", "mlp/down/kernel", "mlp/down/bias"}
    folded = {"heads/in/kernel", "heads/in/bias", "mlp/up/kernel", "mlp/up/bias", "head/kernel", "head/bias"}
    folded |= {f"{norm}/{leaf}" for norm in ("norm1", "norm2", "final") for leaf in ("scale", "bias")}
    assert touched(pn.recenter) == writers
    assert touched(pn.fold_affine) == folded
    assert touched(pn.to_pre_rmsnorm) == writers | folded


@pytest.mark.parametrize("basis", ["reflect", "drop"])
def test_compress_and_decompress_are_inverses(basis, assert_same):
    compact = pn.compress(tree(), SPEC, basis)
    assert compact["embed"].shape == (9, 7)
    assert compact["heads"]["in"]["kernel"].shape == (7, 2, 3)
    assert compact["heads"]["out"]["kernel"].shape == (2, 3, 7)
    assert compact["mlp"]["up"]["kernel"].shape == (5, 7)
    assert compact["mlp"]["down"]["kernel"].shape == (7, 5)
    full = pn.decompress(compact, SPEC, basis)
    assert_same(pn.compress(full, SPEC, basis), compact, EXACT)
    np.testing.assert_allclose(full["embed"].mean(-1), 0, atol=1e-14)
    assert_same(pn.recenter(full, SPEC), full, EXACT)
    packed = pn.pack(compact, SPEC)
    assert_same(pn.unpack(packed, SPEC), compact)
    assert_same(pn.to_pre_crmsnorm(tree(), SPEC, basis, "packed"), packed)


def test_the_gauge_is_blind_to_a_drift_of_the_mean():
    rms, gauged = chain(pn.to_pre_rmsnorm)(tree()), chain(pn.to_pre_rmsnorm, pn.zero_mean_gauge)(tree())
    n = np.random.default_rng(0).normal(size=(1, WIDTH))
    read = [params["head"]["kernel"] for params in (rms, gauged)]
    assert_near((n + 1) @ read[1], n @ read[1])
    assert np.max(np.abs((n + 1) @ read[0] - n @ read[0])) > 1e-2


def test_a_reflected_model_is_a_plain_rms_norm_model():
    plain = pn.to_plain_rmsnorm(pn.compress(tree(), SPEC), SPEC)
    assert_near(model(plain, "rms", pn.plain_eps(EPS, WIDTH)), model(tree()))
    assert np.max(np.abs(model(plain, "rms", EPS) - model(tree()))) > 1e-6  # eps matters
    assert pn.plain_eps(7e-6, 8) == pytest.approx(8e-6)


@pytest.mark.parametrize(
    "change", [pn.decompress, pn.to_plain_rmsnorm, chain(pn.pack)], ids=["decompress", "plain", "pack"]
)
def test_an_affine_that_was_trained_after_the_compression_is_not_lost(change):
    compact = pn.compress(tree(), SPEC)
    for norm in ("norm1", "norm2", "final"):
        compact[norm] = {"scale": np.linspace(0.5, 1.5, 7), "bias": np.linspace(-1, 1, 7)}
    expected = model(compact, "reflect")
    if change is pn.decompress:
        actual = model(pn.decompress(compact, SPEC), "rms")
    elif change is pn.to_plain_rmsnorm:
        actual = model(pn.to_plain_rmsnorm(compact, SPEC), "rms", pn.plain_eps(EPS, WIDTH))
    else:
        actual = model(pn.pack(compact, SPEC), "packed reflect")
    assert_near(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("name", ["to_pre_rmsnorm", "compress"])
def test_storage_dtypes_are_kept_and_rounded_once_from_float64(name, dtype, x64):
    change = getattr(pn, name)
    params = tree(dtype=dtype)
    with jax.enable_x64(x64):
        kind = jnp.asarray if x64 or dtype != np.float64 else np.asarray
        actual = leaves(change(jax.tree.map(kind, params), SPEC))
    assert all(leaf.dtype == dtype for path, leaf in actual.items() if path != "unrelated")
    v = np.full(WIDTH, WIDTH**-0.5) - np.eye(WIDTH)[-1]
    reflection = np.eye(WIDTH) - 2 * np.outer(v, v) / (v @ v)
    wide = {path: leaf.astype(np.float64) for path, leaf in leaves(params).items()}
    written, read = wide["embed"], wide["mlp/up/kernel"] * wide["norm2/scale"][None]
    if name == "compress":
        written, read = ((leaf @ reflection)[:, :-1] for leaf in (written, read))
    else:
        written = written - written.mean(axis=-1, keepdims=True)
    info = jnp.finfo(dtype)
    for path, exact in (("embed", written), ("mlp/up/kernel", read)):
        half_a_step = float(info.eps) / 2 * np.abs(exact) + float(info.smallest_subnormal) / 2
        float64_noise = 1e-14  # of either formula
        error = np.abs(np.asarray(actual[path]).astype(np.float64) - exact)
        assert np.all(error <= half_a_step + float64_noise), path


def test_rounding_to_bfloat16_is_not_doubled():
    # 1 + 2^-8 is a tie of bfloat16 and float32 does not see the 2^-40 that breaks it
    spec = MainBranch([Writer("w")], [Norm([Reader("r", bias="b")], scale="g", bias="beta")])
    bf16 = functools.partial(np.asarray, dtype=jnp.bfloat16)
    params = {
        "w": bf16([[1.0, 1.0]]),
        "r": bf16([[2.0**-8], [2.0**-40]]),
        "g": bf16([1, 1]),
        "beta": bf16([1, 1]),
        "b": bf16([1.0]),
    }
    assert float(pn.fold_affine(params, spec)["b"][0]) == 1 + 2.0**-7
    params["r"] = -params["r"]
    params["b"] = bf16([-1.0])
    assert float(pn.fold_affine(params, spec)["b"][0]) == -1 - 2.0**-7


@pytest.mark.parametrize("basis", ["reflect", "drop"])
def test_a_width_of_two_works_and_one_is_refused(basis):
    spec = MainBranch(SPEC.writers, SPEC.norms, SPEC.others)
    compact = pn.compress(tree(width=2), spec, basis)
    assert_near(model(compact, basis), model(tree(width=2)))
    with pytest.raises(pn.LayoutError, match="compress: the main branch has 1 lanes; expected the nominal width >= 2"):
        pn.compress(tree(width=1), spec, basis)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (chain(pn.compress, pn.compress), "compress: the main branch has 7 lanes; expected the nominal width 8"),
        (chain(pn.decompress), "decompress: the main branch has 8 lanes; expected 7"),
        (chain(pn.pack), "pack: the main branch has 8 lanes; expected 7"),
        (chain(pn.compress, pn.unpack), "unpack: the main branch has 7 lanes; expected 8"),
        (chain(pn.to_pre_rmsnorm, pn.unpack), "heads/in/bias: .*this tree is not packed"),
        (chain(pn.compress, pn.recenter), "recenter: the main branch has 7 lanes; expected 8"),
        (chain(pn.compress, pn.to_pre_rmsnorm), "to_pre_rmsnorm: the main branch has 7 lanes; expected 8"),
        (chain(pn.compress, pn.zero_mean_gauge), "zero_mean_gauge: the main branch has 7 lanes; expected 8"),
        (chain(pn.compress, pn.pack, pn.recenter), "embed: writes nothing to the last lane, .*; unpack it"),
        (chain(pn.compress, pn.pack, pn.to_pre_rmsnorm), "embed: writes nothing to the last lane, .*; unpack it"),
        (chain(pn.to_plain_rmsnorm), "to_plain_rmsnorm: the main branch has 8 lanes; expected 7"),
        (chain(pn.compress, pn.pack, pn.to_plain_rmsnorm), "to_plain_rmsnorm: the main branch has 8 lanes; expected 7"),
        (chain(pn.strip_affine), "norm1/scale: is not 1 everywhere, .*; fold_affine first"),
        (
            lambda p: pn.to_pre_ln(p, MainBranch(SPEC.writers, SPEC.norms, SPEC.others)),
            "to_pre_ln: the description has no width",
        ),
    ],
)
def test_a_tree_of_another_chart_is_refused(change, message):
    with pytest.raises(pn.LayoutError, match=message):
        change(tree())


@pytest.mark.parametrize("change", [pn.compress, pn.decompress, pn.to_pre_crmsnorm, pn.to_pre_ln])
def test_an_unknown_basis_is_refused(change):
    params = pn.compress(tree(), SPEC) if change in (pn.decompress, pn.to_pre_ln) else tree()
    with pytest.raises(ValueError, match="basis: got 'rotate'; allowed: reflect, drop"):
        change(params, SPEC, "rotate")


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout: got 'wide'; allowed: compact, packed"):
        pn.compress(tree(), SPEC, layout="wide")


def test_converting_needs_the_memory_of_the_copy_and_of_a_few_slices(monkeypatch):
    """Beyond the tree: 1 is the copy. Its kernels are several slices large, and of a narrower dtype than what is computed in."""
    monkeypatch.setattr(precision, "SLICE", 2**12)
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.array, tree(width=256, dtype=np.float32))
    for layer, shape in (("up", (2048, 256)), ("down", (256, 2048))):
        params["mlp"][layer]["kernel"] = rng.normal(size=shape).astype(np.float32)
    params["mlp"]["up"]["bias"] = rng.normal(size=2048).astype(np.float32)
    spec = MainBranch(SPEC.writers, SPEC.norms, SPEC.others, width=256)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for change in (pn.to_pre_rmsnorm, pn.compress, packed_at_once):
        tracemalloc.start()
        converted = change(params, spec)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held > 0.95 * size  # what was converted is there, and was seen
        assert peak < 1.2 * size, change
        del converted


def test_to_pre_ln_leaves_a_full_tree_as_it_is(assert_same):
    rms = pn.to_pre_rmsnorm(tree(), SPEC)
    assert_same(pn.to_pre_ln(rms, SPEC), rms)


NO_PLACE = MainBranch(
    SPEC.writers,
    [*SPEC.norms[:2], Norm([Reader("head/kernel")], scale="final/scale", bias="final/bias")],
    SPEC.others,
    WIDTH,
)


def test_a_norm_whose_reader_takes_no_bias_keeps_its_affine(assert_same):
    rms = pn.to_pre_rmsnorm(tree(), NO_PLACE)
    assert_same(rms["final"], tree()["final"])
    assert_same(rms["head"], tree()["head"])
    assert_near(model(rms, "rms"), model(tree()))
    for change in (pn.compress, pn.to_pre_crmsnorm, pn.zero_mean_gauge):
        with pytest.raises(pn.LayoutError, match=r"final/bias: can't be folded: its reader head/kernel has no place"):
            change(tree(), NO_PLACE)
    with pytest.raises(pn.LayoutError, match="final/scale: can't be folded, so it stays"):
        jax.jit(lambda p: pn.strip_affine(pn.to_pre_rmsnorm(p, NO_PLACE), NO_PLACE))(tree())


def test_a_norm_without_beta_folds_into_a_reader_without_bias():
    params = tree()
    del params["final"]["bias"]
    compact = pn.compress(params, NO_PLACE)
    assert "bias" not in compact["head"]
    assert_near(model(compact, "reflect"), model(params))


def test_a_norm_that_is_kept_is_left_alone(assert_same):
    kept = MainBranch(
        SPEC.writers,
        [*SPEC.norms[:2], Norm(scale="final/scale", bias="final/bias", keep="tied")],
        [*SPEC.others, "head/kernel"],
        WIDTH,
    )
    compact = pn.compress(tree(), kept)
    assert_same({name: compact[name] for name in ("final", "head")}, {name: tree()[name] for name in ("final", "head")})
    plain = pn.to_plain_rmsnorm(compact, kept)
    np.testing.assert_allclose(plain["final"]["scale"], np.sqrt(8 / 7) * tree()["final"]["scale"], rtol=1e-15)
    without_scale = {**compact, "final": {"bias": compact["final"]["bias"]}}
    with pytest.raises(pn.LayoutError, match=r"keeps its affine \(tied\) but has no scale"):
        pn.to_plain_rmsnorm(without_scale, kept)


def test_frozen_kernels_and_traced_biases_mix():
    compact = pn.compress(tree(), SPEC)
    biases = {path: leaf for path, leaf in leaves(compact).items() if path.endswith("bias") and "norm" not in path}

    def total(biases):
        return jnp.sum(
            jnp.sin(model(pn.pack(with_leaves(compact, {**leaves(compact), **biases}), SPEC), "packed reflect"))
        )

    gradients = jax.jit(jax.grad(total))(biases)
    assert all(np.any(leaf != 0) for leaf in gradients.values())


@pytest.mark.parametrize(
    ("scale", "kernel", "message"),
    [((2, 8), (3, 8, 4), "its leading .*axes are not those of its reader r"), ((8,), (3, 8, 4), "expected .*3, 4")],
)
def test_stacks_that_do_not_fit_are_refused(scale, kernel, message):
    spec = MainBranch([Writer("w")], [Norm([Reader("r", bias="b")], scale="g", bias="beta")])
    params = {"w": np.ones((5, 8)), "r": np.ones(kernel), "g": np.ones(scale), "beta": np.ones(scale), "b": np.ones(4)}
    with pytest.raises(pn.LayoutError, match=message):
        pn.fold_affine(params, spec)


CONTAINERS = {"FrozenDict": FrozenDict, "nnx.State": lambda params: nnx.State(jax.tree.map(nnx.Param, params))}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize(
    "change", [pn.recenter, pn.compress, chain(pn.compress, pn.pack)], ids=["replace", "add", "remove"]
)
def test_containers_keep_their_type(name, change, assert_same):
    params = CONTAINERS[name](tree(kind=jnp.asarray))
    step = functools.partial(change, spec=SPEC) if change in (pn.recenter, pn.compress) else change
    actual = step(params)
    assert type(actual) is type(params)
    assert_same(leaves(actual), leaves(step(tree(kind=jnp.asarray))))


def test_lists_keep_their_type():
    spec = MainBranch([Writer("0")], [Norm([Reader("2/kernel")], scale="1/scale")])
    params = [tree()["embed"], {"scale": np.full(WIDTH, 2.0)}, {"kernel": np.ones((WIDTH, 3))}]
    actual = pn.to_pre_rmsnorm(params, spec)
    assert type(actual) is list
    np.testing.assert_array_equal(actual[2]["kernel"], 2)


@pytest.mark.parametrize("sequence", [list, tuple])
@pytest.mark.parametrize("change", [pn.to_pre_rmsnorm, functools.partial(pn.compress, layout="packed")])
def test_layers_in_a_list_change_as_those_in_a_dict(sequence, change, assert_same):
    """A bias is added to the first layer and, packed, taken from the second, which lie in no mapping themselves."""
    rng = np.random.default_rng(0)

    def layer(*biases):
        up = {"kernel": rng.standard_normal((WIDTH, 5)), **{name: rng.standard_normal(5) for name in biases}}
        return {
            "norm": {"scale": rng.random(WIDTH), "bias": rng.random(WIDTH)},
            "up": up,
            "down": rng.random((5, WIDTH)),
        }

    layers, embed = [layer(), layer("bias")], rng.random((3, WIDTH))
    up = Reader("layers/{i}/up/kernel", bias="layers/{i}/up/bias")
    norm = Norm([up], scale="layers/{i}/norm/scale", bias="layers/{i}/norm/bias")
    spec = MainBranch([Writer("embed"), Writer("layers/{i}/down")], [norm], width=WIDTH)
    found = change({"embed": embed, "layers": sequence(layers)}, spec)
    wanted = change({"embed": embed, "layers": dict(enumerate(layers))}, spec)
    assert type(found["layers"]) is sequence
    assert_same(leaves(found), leaves(wanted))


def test_a_dtype_for_a_leaf_that_is_not_there_is_refused():
    for change in (pn.to_pre_rmsnorm, pn.compress):
        with pytest.raises(pn.LayoutError, match="dtypes: typo: no such leaf; the paths are like embed"):
            change(tree(), SPEC, dtypes={"typo": np.float32})


@pytest.mark.parametrize("path", ["embed", "head/kernel"])
def test_a_quantised_leaf_is_refused(path):
    params = tree()
    params = with_leaves(params, {**leaves(params), path: np.asarray(leaves(params)[path]).astype(np.int8)})
    with pytest.raises(pn.LayoutError, match=f"{path}: is int8; expected a floating dtype"):
        pn.to_pre_rmsnorm(params, SPEC)


def test_leaves_that_are_no_arrays_are_named_where_they_have_a_role_and_left_alone_elsewhere():
    spec = MainBranch([Writer("w")], [Norm([Reader("r")])], others=["step"])
    params = {"w": np.ones((3, 4)), "r": np.ones((4, 2)), "step": 7}
    assert pn.to_pre_rmsnorm(params, spec)["step"] == 7
    with pytest.raises(pn.LayoutError, match="w: is no array with axes"):
        pn.to_pre_rmsnorm({**params, "w": 3.0}, spec)
    shapes = jax.eval_shape(lambda: {name: params[name] for name in ("w", "r")})
    with pytest.raises(pn.LayoutError, match=r"w: is a shape without values; .*jax\.eval_shape"):
        pn.to_pre_rmsnorm({**shapes, "step": 7}, spec)
