"""Anybody's Flax model: the hard cases are exact in float64, in Linen and in NNX, with looped and with stacked layers.

docs/cases.md says which test is which case.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architecture import VOCABULARY, Config, cross_readers, describe
from cases import CASES
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from running import APIS, NNX, TRANSFORMS, Linen, example, unstacked, worst

import prenorm_jax as pn
from prenorm_jax.paths import leaves

pytestmark = pytest.mark.slow  # on one Python

EXACT = 1e-10
every_api = pytest.mark.parametrize("api", APIS)
every_case = pytest.mark.parametrize("name", CASES)


@every_api
@every_case
def test_looped(name, api):
    case = CASES[name]
    model, x, spec = APIS[api](case.config), example(case.config), describe(case.config, bias=case.gains)
    params = model.params(x)
    expected = model.run(params, x)
    for form in case.forms:
        assert worst(model.converted([spec], form)(params, x), expected) <= EXACT, form
    assert worst(model.control(params, [spec], x), expected) > 1e-3


@every_api
@every_case
def test_stacked(name, api):
    case = CASES[name]
    c = dataclasses.replace(case.config, scan=True)
    model, x, spec = APIS[api](c), example(c), describe(c, bias=case.gains)
    params = model.params(x)
    if c.dropout or c.drop_path:  # a loop draws other masks than a scan
        expected = model.run(params, x)
    else:
        expected = APIS[api](case.config).run(unstacked(params, c.depth), x)
    form = case.forms[(list(CASES).index(name) + list(APIS).index(api)) % len(case.forms)]  # each in its turn
    assert worst(model.converted([spec], form)(params, x), expected) <= EXACT, form


@every_api
@pytest.mark.parametrize(("scan", "forms"), [(False, TRANSFORMS), (True, ("rms", "drop"))], ids=["looped", "stacked"])
def test_encoder_and_decoder(api, scan, forms):
    encoder = Config(scan=scan, headless=True, positions="learned")
    decoder = Config(scan=scan, cross=True, reader_bias=False, kv_heads=1)
    specs = pn.side_by_side(
        describe(encoder, prefix="encoder/", readers=cross_readers(decoder, "decoder/")),
        describe(decoder, prefix="decoder/"),
    )
    model, inputs = APIS[api](encoder, decoder), (example(encoder), 1 + example(decoder)[:, :3])
    params = model.params(*inputs)
    expected = model.run(params, *inputs)
    for form in forms:
        assert worst(model.converted(specs, form)(params, *inputs), expected) <= EXACT, form
    assert worst(model.control(params, specs, *inputs), expected) > 1e-3
    assert worst(model.control(params, specs[1:], *inputs), expected) > 1e-3


def test_main_branches_side_by_side_are_strict():
    encoder, decoder = Config(headless=True), Config(cross=True)
    params = Linen(encoder, decoder).params(example(encoder), example(decoder))
    first = describe(encoder, prefix="encoder/", readers=cross_readers(decoder, "decoder/"))
    second = describe(decoder, prefix="decoder/")
    with pytest.raises(pn.LayoutError, match=r"decoder/.*no rule covers it"):
        first.resolve(params)
    lacking = dataclasses.replace(second, norms=second.norms[:-1])
    with pytest.raises(pn.LayoutError, match=r"decoder/head/bias .*no rule covers it"):
        pn.side_by_side(first, lacking)[0].resolve(params)
    both = pn.side_by_side(first, second)
    assert len(both[0].resolve(params).norms) == 5
    assert both[0].resolve(params).elsewhere >= {"decoder/embed/embedding", "decoder/blocks/1/cross/out/bias"}


@every_api
@pytest.mark.parametrize(("form", "scan"), [("rms", False), ("reflect", True), ("packed", False)])
def test_a_constant_is_recentered_by_hand(api, form, scan):
    c = Config(**CASES["constant positions"].fields, scan=scan)
    write = {
        "rms": pn.recenter_activation,
        "reflect": pn.compress_activation,
        "packed": lambda x: pn.compress_activation(x, layout="packed"),
    }[form]
    spec = dataclasses.replace(describe(c), recentered=())
    model, x = APIS[api](c), example(c)
    params = model.params(x)
    expected = model.run(params, x)
    assert worst(model.converted([spec], form, write=write)(params, x), expected) <= EXACT
    if form == "rms":
        assert worst(model.converted([spec], form, write=jnp.asarray)(params, x), expected) > 1e-3


@every_api
@pytest.mark.parametrize(("scan", "forms"), [(False, TRANSFORMS), (True, ("rms", "drop"))], ids=["looped", "stacked"])
def test_a_tied_table_is_untied(api, scan, forms, monkeypatch):
    for module in ("foreign_linen", "foreign_nnx"):
        monkeypatch.setattr(f"{module}.CLASSES", VOCABULARY)
    c = Config(tied=True, positions="learned", reader_bias=False, scan=scan)
    tied, x = APIS[api](c), example(c)
    params = tied.params(x)
    untied, spec = APIS[api](dataclasses.replace(c, tied=False)), describe(dataclasses.replace(c, tied=False))
    untied_params = pn.untie(params, "embed/embedding", "head/kernel")
    for form in forms:
        assert worst(untied.converted([spec], form)(untied_params, x)[0], tied.run(params, x)) <= EXACT, form
    with pytest.raises(pn.LayoutError, match="head/kernel: is in the tree already"):
        pn.untie(untied_params, "embed/embedding", "head/kernel")
    with pytest.raises(pn.LayoutError, match="embed/table: no such leaf"):
        pn.untie(params, "embed/table", "head/kernel")


@every_api
@pytest.mark.parametrize("scan", [False, True], ids=["looped", "stacked"])
def test_a_stack_with_norms_that_stay(api, scan):
    c = Config(scan=scan)
    model, x, spec = APIS[api](c), example(c), describe(c)
    spec = dataclasses.replace(spec, norms=[dataclasses.replace(spec.norms[0], keep="it is"), *spec.norms[1:]])
    params = model.params(x)
    expected = model.run(params, x)
    for form in ("rms", "drop", "packed") if scan else ("reflect",):
        assert worst(model.converted([spec], form)(params, x), expected) <= EXACT, form


@every_api
@pytest.mark.parametrize("scan", [False, True], ids=["looped", "stacked"])
def test_a_plain_rms_norm_model_of_one_lane_less(api, scan):
    c = Config(scan=scan, positions="learned")
    model, x, spec = APIS[api](c), example(c), describe(c)
    params = model.params(x)
    plain = pn.strip_affine(pn.to_plain_rmsnorm(pn.compress(params, spec), spec), spec)
    rebuilt = APIS[api](dataclasses.replace(c, width=7, plain=True))
    assert worst(rebuilt.run(plain, x), model.run(params, x)) <= EXACT


@every_api
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("LayerScale", "packed"),
        ("tied table", "drop"),
    ],
)
def test_gradients_are_those_of_the_original(api, name, form):
    c = dataclasses.replace(CASES[name].config, depth=1)
    model, x = APIS[api](c), example(c)
    params = model.params(x)

    def gradient(run):
        def loss(params):
            return sum(jnp.sum(jnp.sin(y + 0.1)) for y in jax.tree.leaves(run(params, x)))

        return jax.jit(jax.grad(loss))(params)

    actual, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(run))])
        for run in (model.converted([describe(c)], form), model.run)
    )
    assert worst(actual, expected) <= EXACT


@pytest.mark.parametrize(("api", "dtype"), [("linen", jnp.bfloat16), ("nnx", np.float16)])
def test_storage_dtypes(api, dtype):
    c = Config(reader_bias=False, layer_scale=True)
    model, x, spec = APIS[api](c), example(c), describe(c)
    params = model.params(x, dtype=dtype)
    rms = pn.to_pre_rmsnorm(params, spec)
    assert all(leaf.dtype == dtype for leaf in leaves(rms).values())
    assert "blocks/1/mlp/up/bias" in leaves(rms)

    def wide(tree):
        return jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)

    expected = model.run(wide(params), x)
    rounding = 20 * float(jnp.finfo(dtype).eps)
    assert worst(model.run_form(wide(rms), [spec], "rms", x), expected) < rounding
    logits = jax.tree.leaves(model.run_form(rms, [spec], "rms", x))[0]
    assert logits.dtype == (np.float64 if api == "nnx" else dtype)  # that model's embedding computes in float64
    assert worst([logits.astype(np.float64)], expected) < 2 * rounding


BOXES = {
    "FrozenDict": FrozenDict,
    "nnx.State": lambda params: nnx.State(jax.tree.map(nnx.Param, params)),
    "partitioned": lambda params: jax.tree.map(
        lambda leaf: nn.Partitioned(leaf, names=tuple(f"axis{size}" for size in leaf.shape)), params
    ),
}


@pytest.mark.parametrize("name", BOXES)
def test_containers(name):
    c = Config(reader_bias=False)
    model, x, spec = Linen(c), example(c), describe(c)
    params = model.params(x)
    for form in ("rms", "packed"):
        boxed = TRANSFORMS[form](BOXES[name](params), spec)
        assert type(boxed) is type(BOXES[name](params))
        expected, actual = leaves(TRANSFORMS[form](params, spec)), leaves(boxed)
        assert set(actual) == set(expected)
        for path, leaf in actual.items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        if name == "partitioned":
            for box in jax.tree.leaves(boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned)):
                assert len(box.names) == box.value.ndim
            if form == "rms":
                assert boxed["blocks"]["1"]["mlp"]["up"]["bias"].names == ("axis10",)
                assert boxed["blocks"]["1"]["attn"]["query"]["bias"].names == ("axis2", "axis3")
                assert worst(model.run_form(boxed, [spec], "rms", x), model.run(params, x)) <= EXACT


def test_a_rebuilt_model_takes_the_tree_that_fits():
    c = Config(mlp="gated")
    model, x, spec = NNX(c), example(c), describe(c)
    params = model.params(x)
    narrow = NNX(dataclasses.replace(c, width=7))
    compact = pn.to_pre_crmsnorm(params, spec)
    swapped = pn.swap_norms(narrow.model(narrow.params(x)), spec, compact, norm="pre_crmsnorm")
    assert worst(swapped(x), model.run(params, x)) <= EXACT


@every_api
def test_an_rms_norm_module_is_refused(api):
    c = Config(depth=1, norm_scale=False, norm_bias=False, plain=True)
    model, x, spec = APIS[api](c), example(c), describe(c)
    params = model.params(x)
    with pytest.raises(
        pn.LayoutError, match=r"blocks/0/norm1: the description has a norm there, the model has a RMSNorm"
    ):
        model.converted([spec], "rms")(params, x)
    with pytest.raises(pn.LayoutError, match="is it an RMSNorm model already"):
        spec.check(model.run, params, x)


@every_api
def test_a_norm_that_is_not_there_is_refused(api):
    c = Config(depth=1)
    model, x, spec = APIS[api](c), example(c), describe(c)
    params, (first, *rest) = model.params(x), spec.norms

    def replaced(**fields):
        return dataclasses.replace(spec, norms=[dataclasses.replace(first, **fields), *rest])

    for wrong, message in (
        (
            replaced(module="blocks/{i...}/elsewhere"),
            r"elsewhere: the description has a norm there, the model (has|ran) no LayerNorm",
        ),
        (replaced(eps=1e-5), r"blocks/0/norm1: its epsilon is 0.03, the description says 1e-05"),
        (
            replaced(module="blocks/{i...}/attn"),
            r"blocks/0/attn: the description has a norm there, the model has a Attention",
        ),
    ):
        with pytest.raises(pn.LayoutError, match=message):
            model.converted([wrong], "rms")(params, x)
