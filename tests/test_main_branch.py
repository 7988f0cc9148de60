"""Descriptions are strict: each way in which a description and a tree don't fit is an error that names the leaf, its shape and what to
write; and one description serves looped and stacked layers, both orientations, kernels of any rank and every container."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from prenorm_jax import LayoutError, MainBranch, Norm, Reader, Writer, layer_norm, layouts
from prenorm_jax.paths import TreeError, leaves, with_leaves

BLOCK = Norm([Reader("up/{i}/kernel", bias="up/{i}/bias")], scale="norm/{i}/scale", bias="norm/{i}/bias")
HEAD = Norm([Reader("head/kernel")], scale="final/scale")
WRITERS = [Writer("embed/table"), Writer("down/{i}/kernel"), Writer("down/{i}/bias")]
BRANCH = MainBranch(WRITERS, [BLOCK, HEAD], others=["steps"])


def tree(width=4):
    def layer(*path_and_shape):
        return {str(i): {name: np.ones(shape) for name, shape in path_and_shape} for i in range(2)}

    return {
        "embed": {"table": np.ones((9, width))},
        "norm": layer(("scale", width), ("bias", width)),
        "up": layer(("kernel", (width, 6)), ("bias", 6)),
        "down": layer(("kernel", (6, width)), ("bias", width)),
        "final": {"scale": np.ones(width)},
        "head": {"kernel": np.ones((width, 3))},
        "steps": np.ones(()),
    }


def changed(path, shape):
    """The tree with one leaf of another shape, or without it."""
    flat = leaves(tree())
    if shape is None:
        del flat[path]
    else:
        flat[path] = np.ones(shape)
    nested = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def test_every_leaf_gets_its_role():
    found = BRANCH.resolve(tree())
    assert (found.lanes, found.width) == (4, None)
    assert dict(found.writers) == dict.fromkeys(
        ["embed/table", "down/0/kernel", "down/1/kernel", "down/0/bias", "down/1/bias"], -1
    )
    first, second, head = found.norms
    assert (first.scale, first.bias, second.scale) == ("norm/0/scale", "norm/0/bias", "norm/1/scale")
    assert [(r.kernel, r.axis, r.bias, r.new_bias) for r in second.readers] == [("up/1/kernel", -2, "up/1/bias", False)]
    assert (head.scale, head.bias, head.readers[0].bias) == ("final/scale", None, None)


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("extra/kernel", (4, 4), r"extra/kernel \(4, 4\): no rule covers it; name it as a writer"),
        ("norm/2/scale", (4,), "norm norm/2/scale: no reader; name the linear maps behind it"),
        ("steps", None, "steps: matches nothing in the tree; its paths are like"),
        ("embed/table", None, "embed/table: matches nothing in the tree"),
        ("head/kernel", None, "head/kernel: matches nothing in the tree"),
        ("head/kernel", (3, 4), r"found several: 4 in embed/table \(9, 4\) axis -1; 3 in head/kernel \(3, 4\) axis -2"),
        ("up/1/kernel", (6, 4), r"6 in up/1/kernel \(6, 4\) axis -2; check the axes"),
        ("final/scale", (5,), r"5 in final/scale \(5,\) axis -1"),
        ("head/kernel", (4,), r"head/kernel \(4,\): axis -2 does not exist; give an axis from -1 to -1"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(path, shape, message):
    BRANCH.resolve(tree())
    with pytest.raises(LayoutError, match=message) as error:
        BRANCH.resolve(changed(path, shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"writers": [*WRITERS, Writer("down/0/bias")]}, r"down/0/bias \(4,\): covered by .*; leave one of them"),
        ({"others": ["steps", "head/kernel"]}, r"head/kernel \(4, 3\): covered by reader .* and by others head/kernel"),
        ({"others": ["steps", "**"]}, "covered by"),
        ({"norms": [BLOCK, HEAD, HEAD]}, "final/scale .*covered by norm scale final/scale and by norm scale"),
        ({"others": ["steps", "typo/*"]}, r"typo/\*: matches nothing in the tree"),
        ({"norms": [BLOCK, HEAD, Norm(scale="typo")]}, "norm typo: matches nothing in the tree"),
        ({"norms": [BLOCK, dataclasses.replace(HEAD, readers=())]}, "norm final/scale: no reader"),
        (
            {"norms": [BLOCK, Norm([Reader("head/kernel")], scale="{name}/scale")]},
            r"reader head/kernel: \{name\} of its norm's pattern does not occur in it",
        ),
        ({"width": ("typo", -1)}, "typo: matches nothing in the tree"),
        ({"width": ("head/kernel", -3)}, r"head/kernel \(4, 3\): axis -3 does not exist"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_by_name(fields, message):
    with pytest.raises(LayoutError, match=message):
        dataclasses.replace(BRANCH, **fields).resolve(tree())


def test_a_tied_leaf_is_refused_with_what_to_do():
    tied = MainBranch([Writer("table", axis=-1)], [Norm([Reader("table", axis=-1)], scale="scale")])
    with pytest.raises(LayoutError, match=r"table \(9, 4\): .*; untie it, or keep the norm's affine \(keep=...\)"):
        tied.resolve({"table": np.ones((9, 4)), "scale": np.ones(4)})


def test_an_optional_writer_may_be_missing_and_an_absent_description_is_refused():
    optional = dataclasses.replace(BRANCH, writers=[*WRITERS, Writer("class", optional=True)])
    assert optional.resolve(tree()).lanes == 4
    with pytest.raises(LayoutError, match="names no leaf on the main branch"):
        MainBranch([], [], others=["a"]).resolve({"a": np.ones(2)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MainBranch("a/{i}", []), "writers: 'a/{i}'; expected a list of Writer"),
        (lambda: MainBranch(["a"], []), "writers: 'a' is among them; expected a list of Writer"),
        (lambda: MainBranch([], [Norm(Reader("r"))]), r"readers of a norm: Reader\(.*\); expected a list of Reader"),
        (lambda: MainBranch([], [], others="a/**"), r"others: 'a/\*\*'; expected a list of str or MainBranch"),
        (lambda: MainBranch([], [], width="8"), "width: '8'; expected a number"),
        (lambda: MainBranch([Writer("a", axis="last")], []), "a: axis 'last'; axes are negative numbers, .* last$"),
        (lambda: MainBranch([Writer("a", axis=1)], []), r"a: axis 1; axes are negative.*\(write 1 - rank\)"),
        (lambda: MainBranch([], [Norm([Reader("r", axis=0)])]), "r: axis 0; axes are negative"),
        (lambda: MainBranch([], [], width=("w", 1)), "w: axis 1; axes are negative"),
        (
            lambda: MainBranch([], [Norm([Reader("a/{i}", bias="b/{j}")])]),
            r"b/\{j\}: \{j\} does not occur in .* a/\{i\}",
        ),
        (lambda: MainBranch([], [Norm([Reader("a/*/k", bias="a/*/b")])]), r"a/\*/b: a \* is forgotten"),
    ],
)
def test_an_impossible_description_is_refused_when_it_is_made(make, message):
    with pytest.raises(LayoutError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a/{i}/k", "a/0/k", True),
        ("a/{i}/k", "a/0/1/k", False),
        ("a.{i}.k", "a.0.k", True),
        ("a.{i}.k", "axb.k", False),  # a dot is a dot
        ("a/{i...}/k", "a/k", True),
        ("a/{i...}/k", "a/0/k", True),
        ("a/{i...}/k", "ab/k", False),
        ("a/*/k", "a/b/k", True),
        ("a/*/k", "a/b/c/k", False),
        ("**/k", "a/b/c/k", True),
        ("{i}/{i}", "a/a", True),
        ("{i}/{i}", "a/b", False),
    ],
)
def test_patterns(pattern, path, matches):
    branch = MainBranch([Writer(pattern)], [])
    if matches:
        assert branch.resolve({path: np.ones(3)}).writers == ((path, -1),)
    else:
        with pytest.raises(LayoutError, match="matches nothing"):
            branch.resolve({path: np.ones(3)})


def test_one_rule_serves_looped_and_stacked_layers():
    def params(layers, prefix):
        shapes = {"attn/query": (8, 8), "attn/key": (8, 8), "attn/value": (8, 8), "attn/out": (8, 8)}
        shapes |= {"mlp/up": (8, 16), "mlp/down": (16, 8)}
        flat = {f"{prefix}/{name}/kernel": (*layers, *shape) for name, shape in shapes.items()}
        flat |= {f"{prefix}/{name}/bias": (*layers, shape[-1]) for name, shape in shapes.items()}
        return flat | {f"{prefix}/norm{n}/{leaf}": (*layers, 8) for n in (1, 2) for leaf in ("scale", "bias")}

    rest = {"patch/kernel": (2, 2, 1, 8), "patch/bias": (8,), "head/kernel": (8, 3), "head/bias": (3,)}
    rest |= {"norm/scale": (8,), "norm/bias": (8,)}
    looped = {
        path: np.ones(shape) for path, shape in {**rest, **params((), "blocks/0"), **params((), "blocks/1")}.items()
    }
    stacked = {path: np.ones(shape) for path, shape in {**rest, **params((2,), "blocks")}.items()}
    assert len(layouts.VIT.resolve(looped).norms) == 5
    found = layouts.VIT.resolve(stacked)
    assert (len(found.norms), found.lanes, found.width) == (3, 8, 8)
    assert found.norms[0].scale == "blocks/norm1/scale"


def trees():
    linear = {"kernel": jnp.ones((2, 3))}
    return {
        "dict": {"norm": {"scale": jnp.ones(2)}, "up": linear},
        "integer keys": {0: {"scale": jnp.ones(2)}, 1: linear},
        "dotted keys": {"up.kernel": jnp.ones((2, 3)), "norm.scale": jnp.ones(2)},
        "a list of dicts": [{"kernel": jnp.ones((2, 3))}, {"scale": jnp.ones(2), "none": None}],
        "a dict in a tuple in a list": {"layers": [({"scale": jnp.ones(2), **linear}, None), None]},
        "slashed keys": {"net/~/up": linear, "net/~/norm": {"scale": jnp.ones(2)}},
        "FrozenDict": FrozenDict({"norm": {"scale": jnp.ones(2)}, "up": linear}),
        "nnx.State": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        "nested nnx.State": nnx.state(
            nnx.Sequential(nnx.LayerNorm(2, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        ),
    }


@pytest.mark.parametrize("name", list(trees()))
def test_leaves_are_replaced_added_and_removed_in_the_container_s_own_type(name, assert_same):
    original = trees()[name]
    flat = leaves(original)
    assert_same(with_leaves(original, flat), original)
    path = next(path for path in flat if path.endswith("kernel"))
    added = f"{path.removesuffix('kernel')}added"
    grown = with_leaves(original, {**flat, path: flat[path] + 1, added: jnp.zeros(5)})
    assert type(grown) is type(original)
    assert set(leaves(grown)) == {*flat, added}
    np.testing.assert_array_equal(leaves(grown)[path], flat[path] + 1)
    back = with_leaves(grown, flat)
    assert_same(back, original)
    assert jax.tree.structure(with_leaves(original, {path: flat[path]})).num_leaves == 1
    assert list(leaves(original)) == list(flat)  # as it was


def test_a_container_that_cannot_change_says_so():
    pair = {"a": [np.ones(2), np.ones(2)]}
    with pytest.raises(TreeError, match="a/1: can't be removed from a list; pass the parameters as nested dicts"):
        with_leaves(pair, {"a/0": np.ones(2)})
    with pytest.raises(TreeError, match="a/2: can't be added to this container"):
        with_leaves(pair, {**leaves(pair), "a/2": np.ones(2)})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(TreeError, match="a/b: two leaves have this path"):
        leaves({"a": {"b": np.ones(1)}, "a/b": np.ones(2)})


# What `check` sees.


def mlp(params, x, mask=None):
    """Two MLP blocks behind positions; in a padded vocabulary the last logits are `mask`."""

    def norm(x, scale, bias):
        return layer_norm(x, scale, bias, eps=1e-5)

    x = x @ params["embed"]["table"]
    for i in "01":
        h = norm(x, params["norm"][i]["scale"], params["norm"][i]["bias"])
        h = jax.nn.gelu(h @ params["up"][i]["kernel"] + params["up"][i]["bias"][None])
        x = x + h @ params["down"][i]["kernel"] + params["down"][i]["bias"][None]
    logits = norm(x, params["final"]["scale"], None) @ params["head"]["kernel"]
    return logits if mask is None else jnp.where(jnp.arange(3)[None] < 2, logits, mask)


def initial(seed=0, constant=()):
    """Parameters as a model is initialised: random kernels and tables, norms of ones and zeros, biases of zeros; or ones for some."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = rng.normal(size=shape) if len(shape) > 1 else np.full(shape, float("scale" in path))
        return np.ones(shape) if path in constant else value

    return with_leaves(tree(), {path: leaf(path, value.shape) for path, value in leaves(tree()).items()})


def missing(writer):
    rest = [w for w in WRITERS if w.leaf != writer]
    return dataclasses.replace(BRANCH, writers=rest, others=["steps", writer])


X = np.random.default_rng(1).normal(size=(3, 9))


@pytest.mark.parametrize("constant", [(), ("down/0/bias", "down/1/bias")], ids=["zeros", "ones"])
def test_a_missed_writer_is_seen_in_parameters_that_were_just_initialised(constant):
    BRANCH.check(mlp, initial(constant=constant), X)
    with pytest.raises(LayoutError, match=r"down/0/bias \(4,\): described as no writer"):
        missing("down/{i}/bias").check(mlp, initial(constant=constant), X)


@pytest.mark.parametrize("path", ["down/0/kernel", "head/kernel"])
def test_a_missed_writer_is_seen_behind_a_kernel_of_zeros(path):
    params = initial()
    params = with_leaves(params, {**leaves(params), path: 0 * leaves(params)[path]})
    BRANCH.check(mlp, params, X)
    with pytest.raises(LayoutError, match=r"embed/table \(9, 4\): described as no writer"):
        missing("embed/table").check(mlp, params, X)


@pytest.mark.parametrize("mask", [-1e9, float(np.finfo(np.float32).min), -np.inf])
def test_a_mask_in_an_output_hides_nothing(mask):
    def masked(params, x):
        return mlp(params, x, mask)

    BRANCH.check(masked, initial(), X)
    with pytest.raises(LayoutError, match=r"down/0/kernel \(6, 4\): described as no writer"):
        missing("down/{i}/kernel").check(masked, initial(), X)
    with pytest.raises(LayoutError, match="converted: differs from fn"):
        BRANCH.check(masked, initial(), X, converted=lambda params, x: masked(params, x) * 1.1)


def test_a_function_of_other_parameters_than_its_own_shows_nothing():
    params = initial()
    with pytest.raises(LayoutError, match="no output of fn depends on it, nor on any other writer"):
        BRANCH.check(lambda _, x: mlp(params, x), params, X)


def test_a_function_that_returns_nan_shows_nothing():
    with pytest.raises(LayoutError, match="fn is not finite"):
        BRANCH.check(lambda params, x: mlp(params, x) * np.nan, initial(), X)


def test_check_tells_gamma_from_beta_and_the_biases_of_two_readers():
    def fn(params, x):
        y = layer_norm(x @ params["write"], params["norm"]["gamma"], params["norm"]["beta"], eps=1e-6)
        q, k = (y @ params[name]["kernel"] + params[name]["bias"][None] for name in "qk")
        return jnp.tanh(q) * k

    rng = np.random.default_rng(0)
    shapes = {
        "write": (4, 8),
        "norm": {"gamma": (8,), "beta": (8,)},
        **{n: {"kernel": (8, 5), "bias": (5,)} for n in "qk"},
    }
    params = jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))

    def described(scale, bias, q, k):
        readers = [Reader("q/kernel", bias=f"{q}/bias"), Reader("k/kernel", bias=f"{k}/bias")]
        return MainBranch([Writer("write")], [Norm(readers, scale=f"norm/{scale}", bias=f"norm/{bias}")])

    x = rng.normal(size=(3, 4))
    described("gamma", "beta", "q", "k").check(fn, params, x)
    for wrong in (("beta", "gamma", "q", "k"), ("gamma", "beta", "k", "q")):
        with pytest.raises(LayoutError, match=r"folding its scale .* are the two exchanged, or biases of its readers"):
            described(*wrong).check(fn, params, x)
