"""What a head doesn't read behind the last block isn't computed, and queries, keys and values come out of one product: the same function,
logits and gradients, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import models, placement
from prenorm_jax.hopper import attention as hopper
from prenorm_jax.models import ViTConfig, attention, blocks
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import Mesh

pytestmark = pytest.mark.slow  # on one Python

VIT = ViTConfig(
    width=16,
    depth=3,
    heads=4,
    mlp_width=32,
    image_size=8,
    patch_size=2,
    channels=2,
    classes=5,
    dtype="float64",
    param_dtype="float64",
)
READERS = {
    "class token": {},
    "distillation token too": {"distilled": "head"},
    "stacked": {"scan_layers": True, "unroll": True},
    "recomputed": {"remat": True},
    "recomputed in part": {"remat": True, "remat_saves": "products"},
    "in one loop": {"scan_layers": True},
    "mean": {"pool": "mean"},
    "class token and mean": {"pool": "cls_and_mean"},
}
BATCH = 4
EXACT = 1e-12  # of a leaf's largest value: sums in another order


@pytest.fixture(autouse=True)
def even_of_few_tokens(monkeypatch):
    monkeypatch.setattr(blocks, "FEW", 0)


def images(config):
    shape = (BATCH, config.image_size, config.image_size, config.channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def outcome(config, params, **kwargs):
    """Logits, their gradient, and the intermediates."""

    def loss(params):
        logits, intermediates = models.apply(config, params, images(config), **kwargs)
        return jnp.sum(jnp.sin(logits)), (logits, intermediates)

    (_, (logits, intermediates)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return (logits, gradient), intermediates


def running(random_params, config):
    return models.running(random_params(config), config)


@pytest.fixture
def assert_same_outcome(assert_same, without_key_biases):
    def same(found, expected):
        (logits, gradient), (expected_logits, expected_gradient) = found, expected
        assert_same(logits, expected_logits, EXACT)
        assert_same(without_key_biases(gradient), without_key_biases(expected_gradient), EXACT)

    return same


@pytest.mark.parametrize(
    ("name", "norm"),
    [("class token", "pre_ln"), ("class token", "pre_rmsnorm"), *((name, "pre_crmsnorm") for name in READERS)],
)
def test_what_nobody_reads_changes_nothing(name, norm, random_params, assert_same, assert_same_outcome):
    config = dataclasses.replace(VIT, norm=norm, **READERS[name])
    scales = models.draw_branch_scales(jax.random.key(0), BATCH, config.depth, 0.5)
    params = running(random_params, config)
    (expected, all_of_it), (found, read) = (
        outcome(config, params, branch_scales=scales, only_read=only) for only in (False, True)
    )
    assert_same_outcome(found, expected)
    assert set(read) == {"last"}
    count = config.read_tokens or config.tokens
    assert_same(read["last"], all_of_it["main_branch"][-1][:, :count], EXACT)


def test_the_check_can_fail(monkeypatch, random_params):
    """With other tokens in the place of those that are read it does."""

    def last_token(x, batch, count):
        return x if count is None else x.reshape(batch, -1, x.shape[-1])[:, -1]

    params = running(random_params, VIT)
    expected = outcome(VIT, params)[0]
    monkeypatch.setattr(blocks, "first_tokens", last_token)
    assert float(jnp.abs(outcome(VIT, params, only_read=True)[0][0] - expected[0]).max()) > 1e-3


def test_of_few_tokens_all_are_computed(monkeypatch, random_params, assert_same):
    monkeypatch.setattr(blocks, "FEW", BATCH * VIT.tokens + 1)
    (expected, all_of_it), (found, read) = (
        outcome(VIT, running(random_params, VIT), only_read=only) for only in (False, True)
    )
    assert_same(found, expected)
    assert_same(read["last"], all_of_it["last"][:, :1])


@pytest.mark.parametrize(
    ("name", "least", "most"), [("class token", 0.0, 0.8), ("mean", 0.99, 1.01), ("in one loop", 0.9, 1.01)]
)
def test_it_is_not_computed(name, least, most):
    """Of the last of three layers, 10 of 12 parts of its products: 0.72 of all, and what is no layer."""
    config = dataclasses.replace(VIT, **READERS[name])

    def flops(only_read):
        step = jax.jit(jax.grad(lambda p: models.apply(config, p, images(config), only_read=only_read)[0].sum()))
        return step.lower(models.abstract(config)).compile().cost_analysis()["flops"]

    assert least <= flops(True) / flops(False) <= most


@pytest.fixture
def one_product(monkeypatch):
    """Attention as in hopper's kernels, which take queries, keys and values in one array, written out. Returns the shapes that it met."""
    seen = []

    def attend(qkv, length):
        seen.append([each.shape for each in qkv])
        q, k, v = qkv if len(qkv) == 3 else jnp.split(qkv[0], 3, axis=-1)
        return attention._attend_written_out(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), (jnp.arange(k.shape[1]) < length)[None, None, None]
        )

    monkeypatch.setattr(hopper, "attend", attend)
    monkeypatch.setattr(attention, "TOGETHER", 0)
    return seen


@pytest.mark.parametrize(("scan", "bias"), [(False, False), (True, True)])
def test_one_product_makes_what_three_make(one_product, scan, bias, random_params, assert_same_outcome):
    config = dataclasses.replace(VIT, scan_layers=scan, unroll=scan, qkv_bias=bias)
    params = running(random_params, config)
    expected = outcome(dataclasses.replace(config, attention="xla"), params)[0]
    found = outcome(dataclasses.replace(config, attention="hopper"), params)[0]
    assert_same_outcome(found, expected)
    # 17 tokens in 24 rows, 4 heads of 3 times 4 numbers.
    assert one_product
    assert all(shapes == [(BATCH, 24, 4, 12)] for shapes in one_product)
    # The check can fail: with two heads' columns changed about it does.
    swapped = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.roll(leaf, 4, axis=-1) if "query" in jax.tree_util.keystr(path) else leaf, params
    )
    other = outcome(dataclasses.replace(config, attention="hopper"), swapped)[0]
    assert float(jnp.abs(other[0] - expected[0]).max()) > 1e-3


@pytest.mark.parametrize(
    ("mesh", "together"),
    [(Mesh(), True), (Mesh(data=2, fsdp=2, tensor=2), True), (Mesh(data=1, fsdp=8), False)],
    ids=["8", "2x2x2", "fsdp 8"],
)
def test_on_a_mesh(one_product, mesh, together, random_params, assert_same_outcome):
    """In one product where whole heads lie on a device, and along data gradients of the third layer on exchanged beside the second."""
    config = dataclasses.replace(VIT, scan_layers=True, unroll=True, attention="hopper")
    params, places = running(random_params, config), sharding.make_mesh(mesh)
    expected = outcome(dataclasses.replace(config, attention="xla"), params)[0]
    x = jnp.concatenate([images(config)] * 2)  # for eight devices
    one_product.clear()

    def loss(params, x):
        with placement.within(places):
            logits = models.apply(config, params, x, only_read=True)[0]
        return jnp.sum(jnp.sin(logits)) / 2, logits

    placed = jax.device_put(params, sharding.param_shardings(params, config, places))
    x = jax.device_put(x, sharding.batch_sharding(places))
    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(placed, x)
    assert_same_outcome((logits[:BATCH], gradient), expected)
    examples = 8 // (places.shape["data"] * places.shape["fsdp"])
    wanted = [(examples, 24, 4 // mesh.tensor, 12)] if together else [(examples, 24, 4, 4)] * 3
    assert one_product
    assert all(shapes == wanted for shapes in one_product)
