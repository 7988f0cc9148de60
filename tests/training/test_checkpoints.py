"""Checkpoints: what is saved comes back, in its chart, and another model's workdir is refused untouched."""

import dataclasses
import importlib
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_experiment as small

from prenorm_jax import models
from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.importing import nested
from prenorm_jax.interop.tensors import FormatError
from prenorm_jax.measure import evaluation
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import checkpoints, data, keeping, saving
from prenorm_jax.training.experiment import read_experiment
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import State, init_state


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def saved(workdir: pathlib.Path, experiment, step: int = 5):
    """Saves a state after `step` steps, all of its leaves different from initial ones; returns it with the batches to come."""
    settings = experiment.train
    tx = make_optimizer(experiment.optimizer, settings.steps)
    state = init_state(models.init(experiment.model, settings.seed, settings.coordinates), tx)
    state = jax.tree.map(lambda x: x + 1 if x.ndim else jnp.full_like(x, step), state)
    batches = data.train_batches(data.load(experiment).train, experiment.data, settings.batch_size)
    for _ in range(step):
        next(batches)
    with saving.Checkpoints(workdir, experiment) as manager:
        manager.save(state, batches)
    return state, batches, tx


@pytest.mark.parametrize("coordinates", ["pre_ln", "native"])
def test_a_state_and_its_place_in_the_data_come_back(tmp_path, coordinates):
    experiment = small.experiment(tmp_path / "library", coordinates=coordinates)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(small.MODEL, norm="pre_crmsnorm"))
    state, batches, tx = saved(tmp_path / "run", experiment)
    initial = init_state(models.init(experiment.model, 7, coordinates), tx)
    again = data.train_batches(data.load(experiment).train, experiment.data, experiment.train.batch_size)
    with saving.Checkpoints(tmp_path / "run", experiment) as manager:
        restored = manager.restore(initial, again).state
    assert_same(restored, state)
    np.testing.assert_array_equal(next(again)["inputs"], next(batches)["inputs"])

    loaded = checkpoints.load(tmp_path / "run")
    assert loaded.experiment == experiment
    assert (loaded.coordinates, loaded.step) == (coordinates, 5)
    assert_same(loaded.params, state.params)


def test_a_stamp_says_which_chart(tmp_path):
    experiment = small.experiment(tmp_path / "library")
    native = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, coordinates="native"))
    compressed = dataclasses.replace(native, model=dataclasses.replace(native.model, norm="pre_crmsnorm"))
    charts = [checkpoints.stamp(e)["chart"] for e in (experiment, native, compressed)]
    assert charts == ["pre_ln", "pre_rmsnorm", "pre_crmsnorm, reflect, compact"]


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("saved")
    experiment = small.experiment(root / "library")
    saved(root / "run", experiment)
    return experiment, root / "run"


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ({"width": 32}, "config.model.width: 16 -> 32"),
        ({"depth": 2, "heads": 4}, "config.model.depth: 1 -> 2; config.model.heads: 2 -> 4"),
    ],
)
def test_another_model_is_refused_in_one_line_and_nothing_is_written(workdir, model, difference):
    experiment, folder = workdir
    other = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **model))
    before = files(folder)
    with pytest.raises(ConfigError) as error:
        checkpoints.refuse_other_model(folder, other)
    assert f"holds a checkpoint of another model ({difference}); allowed: the same model" in str(error.value)
    assert "\n" not in str(error.value)
    assert files(folder) == before


def test_what_may_change_is_listed(workdir):
    experiment, folder = workdir
    assert checkpoints.refuse_other_model(folder, experiment) == []
    longer = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, remat=True),
        train=dataclasses.replace(experiment.train, steps=20),
    )
    changed = checkpoints.refuse_other_model(folder, longer)
    assert changed == ["config.model.remat: False -> True", "config.train.steps: 12 -> 20"]


def test_an_empty_workdir_has_no_checkpoint(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_behind_is_no_checkpoint_and_goes_with_the_next_save(tmp_path):
    experiment = small.experiment(tmp_path / "library")
    saved(tmp_path / "run", experiment)
    half = checkpoints.folder(tmp_path / "run") / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "junk").write_text("half")
    found = checkpoints.latest(tmp_path / "run")
    assert found is not None
    assert found[0] == 5
    assert half.exists(), "looking must not sweep"
    saved(tmp_path / "run", experiment, 6)
    assert not half.exists()


def test_only_the_newest_are_kept(tmp_path):
    experiment = small.experiment(tmp_path / "library", keep=2)
    for step in (1, 2, 3):
        saved(tmp_path / "run", experiment, step)
    kept = sorted(int(path.name) for path in checkpoints.folder(tmp_path / "run").iterdir())
    assert kept == [2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, value):
    experiment = small.experiment(tmp_path / "library")
    state, batches, _ = saved(tmp_path / "run", experiment, 5)
    embed = {"table": state.params["embed"]["table"].at[3, 2].set(value)}
    broken = dataclasses.replace(state, params={**state.params, "embed": embed}, step=jnp.int32(6))
    with saving.Checkpoints(tmp_path / "run", experiment) as manager:
        with pytest.raises(FloatingPointError, match="the parameters of step 6 are not finite"):
            manager.save(broken, batches)
        manager.save(dataclasses.replace(state, step=jnp.int32(7)), batches)  # the control
    assert sorted(path.name for path in checkpoints.folder(tmp_path / "run").iterdir()) == ["5", "7"]


def test_an_evaluation_that_is_no_number_is_not_the_best():
    kept = keeping.Kept(1, 1, "loss")
    for step, loss in ((1, 0.5), (2, math.nan), (3, 0.4), (4, 0.4), (5, math.nan)):
        kept.judged(step, {"loss": loss})
    assert kept.stay([1, 2, 3, 4, 5]) == [False, False, False, True, True]


def test_the_best_are_kept_beside_the_newest_also_over_a_restart(tmp_path):
    experiment = small.experiment(tmp_path / "library", keep=1, keep_best=1)
    state, batches, _ = saved(tmp_path / "run", experiment, 1)
    losses = {2: 0.5, 3: 0.2, 4: 0.9, 5: 0.8}
    for several in ((2, 3, 4), (5,)):
        with saving.Checkpoints(tmp_path / "run", experiment) as manager:
            manager.restore(state, batches)
            for step in several:
                manager.save(dataclasses.replace(state, step=jnp.int32(step)), batches, held_out={"loss": losses[step]})
    kept = sorted(int(path.name) for path in checkpoints.folder(tmp_path / "run").iterdir())
    assert kept == [3, 5]
    assert checkpoints.best(tmp_path / "run") == 3
    assert checkpoints.load(tmp_path / "run", step=3).step == 3
    with pytest.raises(FileNotFoundError, match="no checkpoint 4 in"):
        checkpoints.load(tmp_path / "run", step=4)


def test_an_evaluation_judges_the_average_as_training_does_and_says_so(tmp_path, monkeypatch, capsys):
    experiment = small.experiment(tmp_path / "library")
    experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, average=0.5))
    state, batches, _ = saved(tmp_path / "run", experiment)
    average = jax.tree.map(lambda x: x - 3, state.params)
    opt_state = optax.tree.set(state.opt_state, average=average)
    with saving.Checkpoints(tmp_path / "run", experiment) as manager:
        manager.save(State(state.params, opt_state, jnp.int32(6)), batches, held_out={"loss": 1.0})
    judged = []
    monkeypatch.setattr(evaluation, "evaluate_params", lambda experiment, params, *rest: judged.append(params) or [])
    for best in (False, True):
        assert evaluation.evaluate_checkpoint(tmp_path / "run", best=best) == []
        assert "judged is the moving average of its weights (config.optimizer.average = 0.5)" in capsys.readouterr().out
    for params in judged:
        assert_same(params, average)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_an_export_reads_what_is_judged_as_it_was_written(tmp_path, average):
    experiment = small.experiment(tmp_path / "library")
    experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, average=average))
    state, batches, _ = saved(tmp_path / "run", experiment)
    if average:
        opt_state = optax.tree.set(state.opt_state, average=jax.tree.map(lambda x: x - 3, state.params))
        with saving.Checkpoints(tmp_path / "run", experiment) as manager:
            manager.save(State(state.params, opt_state, jnp.int32(6)), batches, held_out={"loss": 1.0})
    folder, judged = checkpoints.folder(tmp_path / "run"), checkpoints.load(tmp_path / "run").params
    (folder / "7").mkdir()  # what is not whole is passed over
    assert_same(nested(open_checkpoint(tmp_path / "run").read()), jax.tree.map(np.asarray, judged))
    (folder / "7").rmdir()
    newest = max((path for path in folder.iterdir()), key=lambda path: int(path.name))
    numbers = json.loads((newest / "fingerprints" / "metadata").read_text())
    (newest / "fingerprints" / "metadata").write_text(json.dumps({path: n + 1 for path, n in numbers.items()}))
    with pytest.raises(FormatError, match=r"is not what was written; without .* the one before is taken"):
        open_checkpoint(tmp_path / "run").read()


def test_a_checkpoint_of_another_version_says_so(tmp_path, monkeypatch):
    saved(tmp_path / "run", small.experiment(tmp_path / "library"))

    def newer(stamp):
        return {**stamp, "train": {**stamp["train"], "newfield": 1}}

    monkeypatch.setattr(checkpoints, "read_experiment", lambda stamp: read_experiment(newer(stamp)))
    with pytest.raises(
        ConfigError, match=r"^checkpoint 5 of .*: written by prenorm_jax .*, this is .*: .*newfield: no such field"
    ):
        checkpoints.load(tmp_path / "run")


def test_a_checkpoint_that_its_run_removes_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    experiment = small.experiment(tmp_path / "library")
    saved(tmp_path / "run", experiment, step=5)
    saved(tmp_path / "later", experiment, step=6)
    folder, read_stamp = checkpoints.folder(tmp_path / "run"), checkpoints.items.read_stamp

    def overtaken(manager, step):
        if (folder / "5").exists():
            shutil.rmtree(folder / "5")
            shutil.copytree(checkpoints.folder(tmp_path / "later") / "6", folder / "6")
            raise ValueError("gone")
        return read_stamp(manager, step)

    monkeypatch.setattr(checkpoints.items, "read_stamp", overtaken)
    assert checkpoints.load(tmp_path / "run").step == 6


def test_a_checkpoint_in_float64_asks_for_it(tmp_path, monkeypatch):
    experiment = small.experiment(tmp_path / "library")
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(small.MODEL, param_dtype="float64"))
    saved(tmp_path / "run", experiment)
    with jax.enable_x64(False), pytest.raises(ConfigError, match="JAX_ENABLE_X64=1 in the environment"):
        checkpoints.load(tmp_path / "run")


def test_the_best_of_none_is_refused(tmp_path):
    saved(tmp_path / "run", small.experiment(tmp_path / "library"))
    with pytest.raises(ConfigError, match=r"^--best: no checkpoint of .* has an evaluation; allowed: without --best"):
        evaluation.evaluate_checkpoint(tmp_path / "run", best=True)


def test_a_prompt_that_is_no_text_or_of_no_run_is_refused(tmp_path, capsys):
    main = importlib.import_module("eval").main
    saved(tmp_path / "run", small.experiment(tmp_path / "library"))
    for flags, line in (
        ([f"--workdir={tmp_path / 'run'}", "--prompt=\udcff"], "--prompt: got '\\udcff'; allowed: text"),
        ([f"--config={tmp_path}", "--prompt=a"], "--prompt: got no --workdir; allowed: that of a run"),
    ):
        assert main(flags) == 2
        assert capsys.readouterr().err == f"eval.py: {line}\n"
