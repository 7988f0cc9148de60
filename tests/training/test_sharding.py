"""Numerics do not depend on the mesh, every leaf lies where a rule puts it, and what can't be split is said."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_experiment import experiment
from trajectories import GPT, OPTIMIZER, RUNS, VIT, losses

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import Mesh
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import abstract_state

MESHES = {"8": Mesh(), "4x2": Mesh(fsdp=2), "2x2x2": Mesh(fsdp=2, tensor=2)}


def in_dtype(model, dtype):
    return dataclasses.replace(model, dtype=dtype, param_dtype=dtype)


@pytest.fixture(scope="module", params=list(RUNS))
def on_one_device(request):
    model, coordinates = RUNS[request.param]
    return model, coordinates, losses(in_dtype(model, "float64"), coordinates)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_losses_of_one_device(on_one_device, name):
    model, coordinates, wide = on_one_device
    mesh = sharding.make_mesh(MESHES[name])
    found, _ = losses(in_dtype(model, "float64"), coordinates, mesh)
    assert np.abs(found - wide).max() <= 1e-10
    assert wide[:5].mean() - wide[-5:].mean() > 0.05  # the run is one in which something happens


@pytest.mark.slow
@pytest.mark.parametrize("run", ["vit", "gpt"])
def test_in_single_precision_too(run):
    model, coordinates = RUNS[run]
    expected, _ = losses(model, coordinates)
    found, _ = losses(model, coordinates, sharding.make_mesh(MESHES["2x2x2"]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_mean_of_the_devices_means_would_be_seen():
    model, coordinates = RUNS["vit"]
    expected, _ = losses(model, coordinates)

    def of_a_device(weights):
        by_device = weights.reshape(8, -1)
        return (by_device / by_device.sum(1, keepdims=True)).reshape(-1)

    found, _ = losses(model, coordinates, weights=of_a_device)
    assert np.abs(found - expected).max() > 1e-3


@pytest.mark.slow
def test_micro_batches_on_a_mesh_are_the_whole_batch():
    model, coordinates = RUNS["gpt native"]
    model = in_dtype(model, "float64")
    expected, _ = losses(model, coordinates)
    found, _ = losses(model, coordinates, sharding.make_mesh(Mesh(data=2, fsdp=2)), accumulate=4)
    assert np.abs(found - expected).max() <= 1e-10


@pytest.mark.parametrize("name", RUNS)
def test_a_device_holds_its_share_of_parameters_and_optimizer(name):
    model, coordinates = RUNS[name]
    # Of a real width: of a tiny one, vectors are a large part.
    model = dataclasses.replace(model, width=256, heads=8, mlp_width=1024)
    tx = make_optimizer(OPTIMIZER, 10)
    state = abstract_state(model, tx, coordinates)
    places = sharding.state_shardings(state, model, tx, sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2)))
    assert jax.tree.structure(state) == jax.tree.structure(places)
    whole, held = 0, 0
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        whole += leaf.size
        held += math.prod(place.shard_shape(leaf.shape))
    assert held / whole < 1 / 4 + 0.02


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("norm", ["pre_ln", "pre_rmsnorm", "pre_crmsnorm"])
@pytest.mark.parametrize(
    "model",
    [
        VIT,
        dataclasses.replace(VIT, pool="cls_and_mean", registers=2, distilled="token", layer_scale=True),
        dataclasses.replace(VIT, pool="mean", pre_logits=8),
        dataclasses.replace(VIT, distilled="head"),
        GPT,
        dataclasses.replace(GPT, tied=False),
    ],
)
def test_every_leaf_of_every_model_has_a_rule_in_every_chart(model, norm, scan_layers):
    model = dataclasses.replace(model, norm=norm, scan_layers=scan_layers)
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    trees = [jax.eval_shape(lambda c=c: models.init(model, 0, c)) for c in ("pre_ln", "native")]
    for tree in (*trees, models.abstract(model)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            spec = sharding.spec_of(name, leaf.shape, model, sizes)
            matrix = name.endswith("kernel") and leaf.ndim - scan_layers * name.startswith("blocks") == 2
            assert not matrix or any(spec), name


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(
        ConfigError, match=r"parameter blocks/0/gate/kernel: no rule says how it is split .* add one to"
    ):
        sharding.param_shardings(
            {"blocks": {"0": {"gate": {"kernel": jnp.zeros((2, 2))}}}}, VIT, sharding.make_mesh(Mesh())
        )


def test_a_leaf_that_an_axis_does_not_divide_is_whole_and_listed():
    model = dataclasses.replace(VIT, classes=7)
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=8))
    params = models.abstract(model)
    assert sharding.wholes(params, model, mesh) == ["head/kernel", "patch/kernel", "position/table"]
    assert sharding.param_shardings(params, model, mesh)["head"]["kernel"].is_fully_replicated


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(fsdp=3), "config.mesh: got 'fsdp x tensor = 3 x 1'; allowed: a divisor of the 8 devices"),
        (Mesh(data=16), "config.mesh: got 'data x fsdp x tensor = 16 x 1 x 1'; allowed: a product of 8 or fewer"),
        (Mesh(data=1, tensor=4), "config.mesh.tensor: got 4; allowed: a divisor of config.model.heads = 2"),
        (Mesh(), "config.train.batch_size: got 4; allowed: a multiple of mesh.data x mesh.fsdp = 8; or fewer devices"),
    ],
)
def test_an_impossible_mesh_is_one_line(tmp_path, mesh, message):
    with pytest.raises(ConfigError) as error:
        sharding.mesh_of(dataclasses.replace(experiment(tmp_path / "library"), mesh=mesh))
    assert str(error.value).startswith(message)
