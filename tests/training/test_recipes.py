"""DeiT III's recipe in small, through the loop: all of its parts at once, and the same bits after an interruption with other readers."""

import dataclasses
import io
import shutil

import jax
import numpy as np
import pictures_on_disk as disk
import pytest
import rich.console

from configs import deit3
from prenorm_jax import models
from prenorm_jax.training import checkpoints, data, loop, metrics, sharding
from prenorm_jax.training.experiment import Mesh, read_experiment
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import init_state, make_train_step
from prenorm_jax.training.tasks import task_of


def small_deit3(root):
    tree = deit3.get_config("variant=S/16,norm=pre_crmsnorm").to_dict()
    tree["model"].update(width=16, depth=2, heads=2, mlp_width=24, image_size=16, patch_size=8, classes=3)
    tree["model"].update(dtype="float32", layer_scale_init=0.1)
    tree["data"].update(root=str(root), workers=0)
    tree["optimizer"].update(warmup_steps=1, learning_rate=0.05)
    tree["train"].update(steps=6, batch_size=16, eval_batch_size=8, stochastic_depth=0.3, accumulate=1)
    tree["train"].update(log_every=1, eval_every=0, checkpoint_every=3)
    return read_experiment(tree)


@pytest.mark.slow
def test_the_recipe_trains_and_continues_with_the_same_bits(tmp_path):
    experiment = small_deit3(disk.write_tree(tmp_path / "pictures"))
    console = rich.console.Console(file=io.StringIO())
    whole = loop.train(experiment, tmp_path / "whole", console)
    rows = [row for row in metrics.read(tmp_path / "whole") if row["kind"] == "train"]
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=0.2), "the binary cross entropy of even odds"
    assert len({row["loss"] for row in rows}) == 6, "each step sees another batch, or other weights"

    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(checkpoints.folder(tmp_path / "stopped") / "6")
    other_readers = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, workers=1, threads=2))
    continued = loop.train(other_readers, tmp_path / "stopped", console)
    assert "resuming at step 3 of 6" in console.file.getvalue()
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(continued), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.slow
def test_a_mesh_mixes_and_skips_as_one_device_does(tmp_path):
    experiment = small_deit3(disk.write_tree(tmp_path / "pictures"))
    model = dataclasses.replace(experiment.model, depth=1, dtype="float64", param_dtype="float64")
    tx = make_optimizer(experiment.optimizer, experiment.train.steps)
    batches = data.train_batches(data.load(experiment).train, experiment.data, 16)
    taken = [next(batches) for _ in range(3)]

    def losses(mesh, **fields):
        step = make_train_step(model, task_of(experiment), tx, mesh=mesh, stochastic_depth=0.3, **fields)
        state, found = init_state(models.init(model, 0), tx), []
        if mesh is not None:
            state = jax.device_put(state, sharding.state_shardings(state, model, tx, mesh))
        for batch in taken:
            state, values = step(state, batch if mesh is None else sharding.whole_batch(batch, mesh))
            found.append(float(values["loss"]))
        return np.array(found)

    expected = losses(None)
    np.testing.assert_allclose(losses(sharding.make_mesh(Mesh(fsdp=2, tensor=2))), expected, rtol=0, atol=1e-6)
    assert np.abs(losses(None, seed=1) - expected).max() > 1e-4
