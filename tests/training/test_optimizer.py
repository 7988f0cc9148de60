"""The schedule's values, which leaves decay, and clipping by global norm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError, GPTConfig, ViTConfig
from prenorm_jax.training.experiment import Optimizer
from prenorm_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

SIZES = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 12}
VIT = ViTConfig(**SIZES, image_size=4, patch_size=2, channels=1, classes=3)
GPT = GPTConfig(**SIZES, context=4, vocab_size=5, tied=False)


def test_schedule_warms_up_and_decays():
    rate = learning_rate_schedule(Optimizer(learning_rate=2.0, final_fraction=0.1, warmup_steps=10), 110)
    assert float(rate(0)) == pytest.approx(0.2)
    assert float(rate(5)) == pytest.approx(0.2 + 1.8 * 5 / 10)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(60)) == pytest.approx(0.2 + 1.8 * 0.5)
    assert float(rate(110)) == pytest.approx(0.2)
    assert float(rate(1000)) == pytest.approx(0.2)


def test_schedule_without_warm_up_starts_at_the_peak():
    rate = learning_rate_schedule(Optimizer(learning_rate=2.0, warmup_steps=0), 100)
    assert float(rate(0)) == pytest.approx(2.0)
    assert float(rate(50)) == pytest.approx(1.0)


def flat(tree) -> dict[str, object]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("norm", ["pre_ln", "pre_rmsnorm", "pre_crmsnorm"])
@pytest.mark.parametrize("coordinates", ["pre_ln", "native"])
@pytest.mark.parametrize("model", [VIT, GPT], ids=["vit", "gpt"])
def test_kernels_and_tables_decay_and_nothing_else(model, coordinates, norm, scan_layers):
    model = dataclasses.replace(model, norm=norm, scan_layers=scan_layers)
    mask = flat(decay_mask(jax.eval_shape(lambda: models.init(model, 0, coordinates))))
    assert {path for path, decays in mask.items() if decays} == {
        path for path in mask if path.rsplit("/", 1)[1] in ("kernel", "table")
    }
    assert any(mask.values())
    assert not all(mask.values())


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="parameter blocks/gate: no rule of DECAY_RULES"):
        decay_mask({"blocks": {"gate": jnp.zeros(3)}})


def test_decay_moves_what_decays():
    model = dataclasses.replace(VIT, depth=1)
    params = jax.jit(lambda: jax.tree.map(lambda x: x + 1.0, models.init(model, 0)))()
    tx = make_optimizer(Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda zeros, params: tx.update(zeros, tx.init(params), params)[0])(zeros, params)
    mask, values = flat(decay_mask(params)), flat(params)
    for path, update in flat(updates).items():
        expected = -0.1 * 0.5 * values[path] if mask[path] else jnp.zeros_like(update)
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize(("clip_norm", "moment"), [(1.0, 0.1 * 1.0), (0.0, 0.1 * 8.0)])
def test_clipping_bounds_the_global_norm_and_zero_means_none(clip_norm, moment):
    params = {"a": {"kernel": jnp.zeros(32)}, "b": {"bias": jnp.zeros(32)}}
    tx = make_optimizer(Optimizer(clip_norm=clip_norm), 1000)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    mu = next(node.mu for node in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(node, "mu"))
    norm = float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(mu))))
    assert norm == pytest.approx(moment, rel=1e-6)


def test_the_state_has_one_structure_with_and_without_clipping():
    params = {"kernel": jnp.zeros(3)}
    structures = {jax.tree.structure(make_optimizer(Optimizer(clip_norm=c), 1000).init(params)) for c in (0.0, 1.0)}
    assert len(structures) == 1


def test_lamb_s_steps_are_as_long_as_their_leaves_times_the_rate():
    """The definition (You et al., 2020) written out for a kernel, and Adam's own step for a bias, which has no decay."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    grads = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
    settings = Optimizer(name="lamb", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0.0)
    tx = make_optimizer(settings, 10)
    updates = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)
    adam = {name: grad / (np.abs(grad) + settings.eps) for name, grad in grads.items()}  # the first step's
    direction = adam["kernel"] + 0.5 * params["kernel"]
    length = np.linalg.norm(params["kernel"]) / np.linalg.norm(direction)
    np.testing.assert_allclose(updates["kernel"], -0.1 * length * direction, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.1 * adam["bias"], rtol=1e-6)
