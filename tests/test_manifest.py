"""A manifest is made from a tree, survives JSON, and is held against what is loaded: each contradiction is one line that names it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prenorm_jax as pn
from prenorm_jax import MainBranch, ManifestError, Norm, Reader, Writer

WIDTH = 8
SPEC = MainBranch(
    [Writer("embed"), Writer("{i}/down/kernel"), Writer("{i}/down/bias")],
    [
        Norm([Reader("{i}/up/kernel", bias="{i}/up/bias")], scale="{i}/norm/scale", bias="{i}/norm/bias", eps=1e-6),
        Norm([Reader("head/kernel", bias="head/bias")], scale="norm/scale", bias="norm/bias", eps=1e-5),
    ],
    width=WIDTH,
)


def tree(layers=2, dtype=np.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.5 + rng.normal(size=shape), dtype)

    def norm():
        return {"scale": normal(WIDTH), "bias": normal(WIDTH)}

    def linear(rows, columns):
        return {"kernel": normal(rows, columns), "bias": normal(columns)}

    blocks = {str(i): {"norm": norm(), "up": linear(WIDTH, 5), "down": linear(5, WIDTH)} for i in range(layers)}
    return {"embed": normal(9, WIDTH), **blocks, "norm": norm(), "head": linear(WIDTH, 4)}


def strip(params):
    return pn.strip_affine(params, SPEC)


PRE_RMSNORM = pn.to_pre_rmsnorm(tree(), SPEC)
COMPACT = pn.compress(tree(), SPEC)
CHARTS = {
    "pre_ln": (tree(), {}),
    "pre_rmsnorm": (PRE_RMSNORM, {"chart": "pre_rmsnorm"}),
    "pre_rmsnorm, own affine": (pn.recenter(tree(), SPEC), {"chart": "pre_rmsnorm"}),
    "compact": (COMPACT, {"chart": "pre_crmsnorm"}),
    "compact, drop": (strip(pn.compress(tree(), SPEC, "drop")), {"chart": "pre_crmsnorm", "basis": "drop"}),
    "packed": (pn.pack(strip(COMPACT), SPEC), {"chart": "pre_crmsnorm", "layout": "packed"}),
    "plain": (pn.to_plain_rmsnorm(COMPACT, SPEC), {"chart": "pre_crmsnorm", "layout": "plain"}),
    "bfloat16": (pn.to_pre_rmsnorm(tree(dtype=jnp.bfloat16), SPEC), {"chart": "pre_rmsnorm"}),
}
every_chart = pytest.mark.parametrize("name", CHARTS)


def loaded(made):
    return json.loads(json.dumps(made))


@every_chart
def test_a_manifest_is_that_of_its_tree(name):
    params, words = CHARTS[name]
    made = pn.manifest(params, SPEC, computation="bfloat16", notes={"from": "here"}, **words)
    assert loaded(made) == made
    pn.check_manifest(loaded(made), params, SPEC)
    assert made["width"] == WIDTH
    assert made["lanes"] == params["embed"].shape[-1]
    assert {norm["eps"] for norm in made["norms"].values()} == {1e-5, 1e-6}
    folded = name not in ("pre_ln", "pre_rmsnorm, own affine")
    assert {norm["folded"] for norm in made["norms"].values()} == {folded}
    assert set(made["storage"]) == {"bfloat16" if name == "bfloat16" else "float32"}


@every_chart
def test_shapes_alone_are_checked_where_there_are_no_values(name):
    params, words = CHARTS[name]
    shapes = jax.eval_shape(lambda: params)
    made = pn.manifest(shapes, SPEC, **words)
    pn.check_manifest(made, params, SPEC)
    pn.check_manifest(pn.manifest(params, SPEC, **words), shapes, SPEC)


@pytest.mark.parametrize(
    ("of", "tree_of", "line"),
    [
        ("pre_rmsnorm", "pre_ln", "folded True; its scale and bias in the tree say False"),
        ("pre_rmsnorm, own affine", "pre_ln", "chart: got pre_rmsnorm, but .*: its mean along the main branch"),
        ("compact", "pre_ln", "lanes: got 7 .pre_crmsnorm, reflect, compact.; the tree's main branch has 8"),
        ("packed", "pre_ln", "tree: .*written for other paths or shapes"),
        ("pre_ln", "compact", "lanes: got 8 .pre_ln.; the tree's main branch has 7"),
        ("pre_ln", "pre_rmsnorm", "folded False; its scale and bias in the tree say True"),
        ("bfloat16", "pre_rmsnorm", "storage: got .*bfloat16.*a cast tree needs a new one"),
    ],
)
def test_another_chart_of_the_same_model_is_found(of, tree_of, line):
    made = pn.manifest(CHARTS[of][0], SPEC, **CHARTS[of][1])
    with pytest.raises(ManifestError, match=line):
        pn.check_manifest(loaded(made), CHARTS[tree_of][0], SPEC)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"chart": "pre_rmsnorm"}, "but .*: its mean along the main branch"),
        ({"chart": "pre_crmsnorm"}, "width: got 9; the description says 8"),
        ({"chart": "pre_crmsnorm", "layout": "packed"}, "0/up/bias is a reader's bias"),
        ({"chart": "pre_crmsnorm", "layout": "packed"}, "embed writes to the spare lane"),
        ({"chart": "pre_crmsnorm", "layout": "packed"}, "has an affine of its own"),
        ({"chart": "post_ln"}, "chart: got 'post_ln'; expected pre_ln, pre_rmsnorm, pre_crmsnorm"),
        ({"basis": "drop"}, "chart pre_ln: got basis 'drop' and layout None"),
        ({"chart": "pre_crmsnorm", "basis": "drop", "layout": "plain"}, "expected 'reflect'"),
        ({"chart": "pre_rmsnorm", "coordinates": "pre_ln"}, "coordinates: got 'pre_ln' of a pre_rmsnorm tree"),
    ],
)
def test_a_chart_that_is_not_the_trees_is_not_written(words, line):
    with pytest.raises(ManifestError, match=line):
        pn.manifest(tree(), SPEC, **words)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format": 2}, "format: got 2; this version of prenorm_jax .* reads 1; install the one that wrote it"),
        ({"chart": None}, "chart: got None; expected pre_ln"),
        ({"lanes": True}, "lanes: got True; expected a positive integer"),
        ({"norms": {"norm/scale": {"eps": 1e-5}}}, "norms: got .*expected name -> "),
        ({"norms": {}}, "norms: .*norm/scale is not in the manifest .3 such.: it was written for another model"),
        ({"author": "me"}, "author: unknown; what you add goes into notes"),
        ({"width": 9}, "lanes: got 8 of nominal width 9"),
        ({"tree": "0"}, "tree: got 0, found .*: written for other paths or shapes"),
    ],
)
def test_what_can_not_be_read_is_refused(change, line):
    with pytest.raises(ManifestError, match=line):
        pn.check_manifest({**pn.manifest(tree(), SPEC), **change}, tree(), SPEC)


@pytest.mark.parametrize("field", list(pn.manifest(tree(), SPEC)))
def test_a_missing_field_is_named(field):
    made = pn.manifest(tree(), SPEC)
    del made[field]
    with pytest.raises(ManifestError, match=f"^manifest: {field}: is missing; expected "):
        pn.check_manifest(made, tree(), SPEC)


def test_something_else_is_refused():
    with pytest.raises(ManifestError, match="got a str; expected the dict"):
        pn.check_manifest("pre_ln", tree(), SPEC)


def test_another_model_is_refused():
    made = pn.manifest(tree(), SPEC)
    with pytest.raises(
        ManifestError, match=r"norms: 1/norm/scale is not in the tree .1 such.: it was written for another"
    ):
        pn.check_manifest(made, tree(layers=1), SPEC)
    wider_mlp = {**tree(), "head": {"kernel": jnp.ones((WIDTH, 6)), "bias": jnp.ones(6)}}
    with pytest.raises(ManifestError, match="written for other paths or shapes"):
        pn.check_manifest(made, wider_mlp, SPEC)
    with pytest.raises(pn.LayoutError, match="no rule covers it"):
        pn.check_manifest(made, {**tree(), "more": jnp.ones(3)}, SPEC)


def test_eps_is_the_descriptions_or_given_but_never_assumed():
    silent = dataclasses.replace(SPEC, norms=[dataclasses.replace(norm, eps=None) for norm in SPEC.norms])
    with pytest.raises(ManifestError, match="0/norm/scale: its eps is not known"):
        pn.manifest(tree(), silent)
    with pytest.raises(ManifestError, match="1/norm/scale: its eps is not known"):
        pn.manifest(tree(), silent, eps={"0/norm/scale": 1e-3})
    made = pn.manifest(tree(), silent, eps=1e-3)
    assert {norm["eps"] for norm in made["norms"].values()} == {1e-3}
    with pytest.raises(ManifestError, match=r"norm 0/norm/scale: got eps 0.001; the description says 1e-06"):
        pn.check_manifest(made, tree(), SPEC)


def test_a_norm_that_keeps_its_affine_says_why():
    first = Norm([Reader("{i}/up/kernel")], scale="{i}/norm/scale", bias="{i}/norm/bias", eps=1e-6)
    closed = dataclasses.replace(SPEC, norms=[first, SPEC.norms[1]], others=["{i}/up/bias"])
    made = pn.manifest(pn.to_pre_rmsnorm(tree(), closed), closed, "pre_rmsnorm")
    assert made["norms"]["0/norm/scale"] == {
        "eps": 1e-6,
        "kept": "its reader 0/up/kernel can take no bias",
        "folded": False,
    }
    assert made["norms"]["norm/scale"] == {"eps": 1e-5, "kept": None, "folded": True}
    with pytest.raises(ManifestError, match=r"norm 0/norm/scale: got kept 'its reader .*; the description says None"):
        pn.check_manifest(made, pn.to_pre_rmsnorm(tree(), closed), SPEC)
