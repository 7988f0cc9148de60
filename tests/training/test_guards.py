"""A loss or a gradient that is not finite: it stops the run and names its step, or is skipped; no parameter ever sees it."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import rich.console
import small_experiment as small

from prenorm_jax import models
from prenorm_jax.training import checkpoints, data, guards, loop, metrics
from prenorm_jax.training.experiment import Optimizer
from prenorm_jax.training.guards import Guard, NotFinite
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import init_state, make_train_step
from prenorm_jax.training.tasks import LanguageModelling

BAD = 8  # the step whose batch is spoilt


@pytest.fixture
def experiment(tmp_path):
    return small.experiment(tmp_path / "library", checkpoint_every=3)


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch):
    """Batches of which chosen ones have weights that are not finite; chosen: counted from 1 of the whole run."""
    original = data.train_batches

    def spoil(*steps: int) -> None:
        class Spoilt:
            def __init__(self, batches):
                self.batches, self.taken = batches, 0

            def __next__(self):
                self.taken += 1
                batch = next(self.batches)
                return {**batch, "weights": batch["weights"] * np.float32("nan")} if self.taken in steps else batch

            def get_state(self):
                return {"inner": self.batches.get_state(), "taken": self.taken}

            def set_state(self, state):
                self.batches.set_state(state["inner"])
                self.taken = state["taken"]

            def close(self):
                self.batches.close()

        monkeypatch.setattr(data, "train_batches", lambda *arguments: Spoilt(original(*arguments)))

    return spoil


def train(experiment, workdir):
    console = rich.console.Console(file=io.StringIO(), width=200)
    return loop.train(experiment, workdir, console), console.file.getvalue()


def with_train(experiment, **fields):
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **fields))


def finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_a_bad_batch_changes_nothing_but_its_number(accumulate):
    tx = make_optimizer(Optimizer(warmup_steps=1), 10)
    step = make_train_step(small.MODEL, LanguageModelling(256), tx, accumulate=accumulate)
    state = init_state(models.init(small.MODEL, 0), tx)
    tokens = np.arange(4 * 17).reshape(4, 17) % 256
    good = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(4, np.float32)}
    bad = {**good, "weights": np.array([1, 1, np.inf, 1], np.float32)}
    state, values = step(state, good)
    assert values["finite"]
    before = jax.tree.map(np.array, state)
    state, values = step(state, bad)
    assert not values["finite"]
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    # The control: the next good batch does change them.
    state, values = step(state, good)
    assert values["finite"]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, before.params)
    assert any(jax.tree.leaves(moved))


def test_a_gradient_alone_that_is_not_finite_is_seen():
    values = {"loss": 1.0, "grad_norm": float("inf"), "finite": 0.0}
    with pytest.raises(NotFinite, match="the gradient norm of step 3 is inf; parameters of before it"):
        Guard(0).check(3, values)
    assert Guard(0).check(3, {"loss": 1.0, "grad_norm": 2.0, "finite": 1.0}) is None


def test_a_run_stops_names_the_step_and_keeps_the_checkpoint_before_it(experiment, spoilt, tmp_path):
    spoilt(BAD)
    with pytest.raises(
        NotFinite, match=f"the loss of step {BAD} is nan; parameters of before it, and no others, are kept"
    ):
        train(experiment, tmp_path / "run")
    loaded = checkpoints.load(tmp_path / "run")
    assert loaded.step == 6
    assert finite(loaded.params)
    assert [row["step"] for row in metrics.read(tmp_path / "run") if row["kind"] == "train"] == list(range(1, BAD))
    # It is met again where it was; and with leave to skip it the run goes on from there.
    with pytest.raises(NotFinite, match=f"step {BAD} "):
        train(experiment, tmp_path / "run")
    _, output = train(with_train(experiment, skip_nonfinite=1), tmp_path / "run")
    assert f"step {BAD}: the loss is nan; skipped (1 of at most 1)" in output
    assert checkpoints.load(tmp_path / "run").step == 12


def test_a_bad_step_at_a_checkpoint_is_not_in_it(experiment, spoilt, tmp_path):
    spoilt(9)  # is due for a checkpoint
    with pytest.raises(NotFinite, match="step 9 "):
        train(experiment, tmp_path / "run")
    assert checkpoints.load(tmp_path / "run").step == 6


@pytest.mark.slow
def test_skipped_steps_are_counted_over_a_resume(experiment, spoilt, tmp_path):
    spoilt(2, BAD)
    allowed = with_train(experiment, skip_nonfinite=1)
    for _ in range(2):  # the second time from the checkpoint of step 6, which knows of step 2
        with pytest.raises(
            NotFinite, match=rf"step {BAD} is nan, after 1 skipped steps \(config.train.skip_nonfinite\)"
        ):
            train(allowed, tmp_path / "run")
    params, _ = train(with_train(experiment, skip_nonfinite=2), tmp_path / "run")
    assert finite(params)
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "skipped"] == [2, BAD]
    # The learning rate is that of the updates, which lag behind by the skipped steps.
    rates = {row["step"]: row["learning_rate"] for row in rows if row["kind"] == "train"}
    assert rates[1] == pytest.approx(experiment.optimizer.learning_rate / 3)
    assert rates[3] == pytest.approx(experiment.optimizer.learning_rate * 5 / 9)


def test_a_run_that_explodes_leaves_finite_checkpoints(experiment, tmp_path):
    exploding = dataclasses.replace(
        experiment, optimizer=dataclasses.replace(experiment.optimizer, learning_rate=1e38, clip_norm=0.0)
    )
    with pytest.raises(NotFinite, match=r"the loss of step \d is (nan|inf)"):
        train(with_train(exploding, checkpoint_every=1), tmp_path / "run")
    assert finite(checkpoints.load(tmp_path / "run").params)


def test_without_the_guard_the_parameters_would_not_be_finite(experiment, spoilt, tmp_path, monkeypatch):
    """The control: what the other tests hold is the guard's doing."""
    monkeypatch.setattr(guards, "keep_where", lambda finite, new, old: new)
    spoilt(BAD)
    with pytest.raises(FloatingPointError, match=r"the parameters of step 9 are not finite|step 9 is nan"):
        train(with_train(experiment, skip_nonfinite=1), tmp_path / "run")
