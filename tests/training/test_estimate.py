"""The estimate against what a real state holds and what compiled programs on a card needed, and that it allocates nothing."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest
from trajectories import GPT

from prenorm_jax.models import ViTConfig, attention, blocks
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import estimate, sharding
from prenorm_jax.training.experiment import Experiment, Mesh, Optimizer, Train
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import abstract_state, init_state

ROOT = pathlib.Path(__file__).parents[2]
DEEP = dataclasses.replace(GPT, width=64, heads=4, mlp_width=256, depth=6, norm="pre_crmsnorm")


def experiment(**fields):
    train = Train(batch_size=16, eval_batch_size=16, steps=10, coordinates="native")
    return Experiment(task="language_modelling", model=DEEP, train=train, optimizer=Optimizer(warmup_steps=0), **fields)


@pytest.mark.slow
def test_the_state_is_that_of_a_real_one_and_depth_is_extrapolated():
    this = experiment(mesh=Mesh(data=2, fsdp=2, tensor=2))
    attend = attention.attend
    found = estimate.measure(this)  # from two and four layers
    assert attention.attend is attend  # what stands in for it is gone
    mesh, tx = sharding.make_mesh(this.mesh), make_optimizer(this.optimizer, 10)
    expected = abstract_state(DEEP, tx, "native")
    places = sharding.state_shardings(expected, DEEP, tx, mesh)
    from prenorm_jax import models

    state = jax.jit(lambda: init_state(models.init(DEEP, 0, "native"), tx), out_shardings=places)()
    batch = {key: jax.numpy.zeros(x.shape, x.dtype) for key, x in estimate._batch(DEEP, 16).items()}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, batch)))
    assert found["state"] == pytest.approx(held, rel=1e-3)
    # Layers are alike: all six compiled at once come to the same.
    whole = estimate._at_depth(this, 6)
    for key in ("state", "kept", "gradients", "flop", "exchanged"):
        assert found[key] == pytest.approx(whole[key], rel=0.02), key


@pytest.mark.slow
def test_more_devices_than_there_are_in_a_process_of_its_own():
    [row] = estimate.rows(experiment(mesh=Mesh(data=1, fsdp=16)))
    [alone] = estimate.rows(experiment(mesh=Mesh(data=1)))
    assert row["mesh"] == [1, 16, 1]
    assert row["state"] < alone["state"] / 8
    assert "| 1 x 16 x 1 | 16 |" in estimate.table([row])


def test_a_mesh_that_can_not_be_is_one_line():
    with pytest.raises(
        ConfigError, match=r"config\.mesh: got 'fsdp x tensor = 3'; allowed: a divisor of the 8 devices"
    ):
        estimate.of(experiment(mesh=Mesh(fsdp=3)))
    with pytest.raises(ConfigError, match=r"config\.mesh: got '1000000 devices'; allowed: 4096 at most in an estimate"):
        estimate.of(experiment(mesh=Mesh(fsdp=10**6)))
    with pytest.raises(ConfigError, match=r"config\.mesh\.tensor: got 8; allowed: a divisor of config\.model\.heads"):
        estimate.of(experiment(mesh=Mesh(data=1, tensor=8)))
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size: got .*; allowed: a multiple of mesh"):
        estimate.of(experiment(mesh=Mesh(data=7)))


def test_the_guides_figures_are_those_measured():
    rows = json.loads((ROOT / "results/scale/estimate.json").read_text())["estimates"]
    guide = (ROOT / "docs/scale.md").read_text()
    assert estimate.table(rows) in guide
    assert estimate.against_compiled(rows, ROOT / "results/speed") in guide
    ratios = [
        float(x)
        for x in re.findall(r"\| (\d\.\d\d) \|$", estimate.against_compiled(rows, ROOT / "results/speed"), re.M)
    ]
    assert len(ratios) == 3
    assert all(0.9 < ratio < 1.1 for ratio in ratios)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(data=8), Mesh(data=1, fsdp=8)], ids=["data", "fsdp"])
def test_a_recomputed_layer_keeps_one_main_branch(mesh):
    """Not what was written to it apart, and no copy of its weights."""
    model = dataclasses.replace(DEEP, norm="pre_rmsnorm", remat=True, remat_saves="nothing")
    this = dataclasses.replace(experiment(mesh=mesh), model=model)
    two, four = (estimate._at_depth(this, depth)["kept"] for depth in (2, 4))
    tokens = this.train.batch_size // 8 * model.context
    # Exact in a process of its own; in the whole suite 8 bytes a layer more were seen, a scalar. An array would be thousands.
    assert 0 <= four - two - 2 * tokens * model.width * 4 <= 2 * 8


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["one by one", "in one loop"])
def test_a_vit_whose_head_reads_one_token(scan, monkeypatch):
    """Depth is extrapolated beyond the last layer, which is smaller where blocks run one by one."""
    monkeypatch.setattr(blocks, "FEW", 0)
    model = ViTConfig(width=64, depth=6, heads=4, mlp_width=256, image_size=16, patch_size=2, scan_layers=scan)
    this = dataclasses.replace(
        experiment(mesh=Mesh(data=2)), task="image_classification", model=model, optimizer=Optimizer(warmup_steps=0)
    )
    found, whole = estimate.measure(this), estimate._at_depth(this, 6)
    for key in ("state", "kept", "gradients", "flop", "exchanged"):
        assert found[key] == pytest.approx(whole[key], rel=0.02), key
    mean = estimate._at_depth(
        dataclasses.replace(this, model=dataclasses.replace(model, pool="mean", class_token=True)), 6
    )
    # Of the last layer's products keys and values are left, 2 of 12 parts.
    assert mean["flop"] / whole["flop"] == pytest.approx(1.0 if scan else 6 / (5 + 2 / 12), rel=0.03)
