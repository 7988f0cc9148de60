"""The one training loop: resume, train, evaluate, checkpoint, and the picture at the end."""

import contextlib
import json
import pathlib
import time
from typing import Any

import grain
import jax
import numpy as np
import rich.console

from prenorm_jax import models
from prenorm_jax.models.config import require
from prenorm_jax.training import checkpoints, data, metrics, sharding
from prenorm_jax.training.experiment import Experiment, as_tree
from prenorm_jax.training.initial import initial_params
from prenorm_jax.training.interrupts import Interrupted, Interrupts
from prenorm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from prenorm_jax.training.step import (
    Params,
    State,
    abstract_state,
    init_state,
    judged_params,
    make_eval_step,
    make_train_step,
)
from prenorm_jax.training.tasks import Task, task_of


def train(experiment: Experiment, workdir: pathlib.Path, console: rich.console.Console | None = None) -> Params:
    """Trains from the workdir's newest checkpoint, or from the start, up to experiment.train.steps.

    Writes into `workdir`: config.json, metrics.jsonl, tensorboard/, checkpoints/ and loss.png. Evaluates on the
    held-out examples every eval_every steps and after the last one. On one platform the same experiment gives the
    same bits, however often it was interrupted.

    Returns: the trained parameters, or their moving average where one is kept, in experiment.train.coordinates.
    Raises:
      ConfigError: the workdir holds another model's checkpoint, or the model is `no_norm`. Nothing is written.
      DataError: the data can't be read. Nothing is written.
      FloatingPointError: the loss is not finite.
      Interrupted: SIGINT or SIGTERM; the step under way was finished and saved.
    """
    console = console or rich.console.Console()
    require(
        experiment.model.norm != "no_norm", "config.model.norm", "no_norm", "a norm: no_norm is a control for timing"
    )
    changed = checkpoints.refuse_other_model(workdir, experiment)
    splits = data.load(experiment)
    run = _Run(experiment, splits)
    workdir.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoints.Checkpoints(workdir, experiment))
        batches = data.train_batches(splits.train, experiment.data, experiment.train.batch_size)
        state = saved.restore(run.initial_state(), batches)
        start = int(state.step)
        _announce(console, experiment, workdir, state, splits, changed)
        (workdir / "config.json").write_text(json.dumps(as_tree(experiment), indent=2) + "\n")
        written = stack.enter_context(metrics.Metrics(workdir, start))
        progress = stack.enter_context(metrics.Progress(console, start, experiment.train.steps))
        interrupts = stack.enter_context(Interrupts())
        state = run.steps(state, batches, saved, written, progress, interrupts)
    metrics.draw(metrics.read(workdir), workdir / "loss.png", f"{experiment.data.name}, {experiment.model.norm}")
    return judged_params(state)


class _Run:
    """The compiled functions of one experiment, and the order in which the loop calls them."""

    def __init__(self, experiment: Experiment, splits: data.Splits) -> None:
        model, settings = experiment.model, experiment.train
        self.experiment, self.splits = experiment, splits
        self.task: Task = task_of(experiment)
        self.mesh = sharding.mesh_of(experiment)
        self.tx = make_optimizer(experiment.optimizer, settings.steps)
        self.train_step = make_train_step(
            model,
            self.task,
            self.tx,
            coordinates=settings.coordinates,
            accumulate=settings.accumulate,
            mesh=self.mesh,
        )
        self.eval_step = make_eval_step(model, self.task, self.mesh)
        self.running = jax.jit(lambda params: models.running(params, model, settings.coordinates))
        # All at once: a schedule asked step by step would queue its arithmetic behind the training step on the device.
        schedule = learning_rate_schedule(experiment.optimizer, settings.steps)
        self.learning_rates = np.asarray(jax.vmap(schedule)(np.arange(settings.steps)))

    def initial_state(self) -> State:
        """The state before the first step, each leaf made where the mesh has it."""
        experiment = self.experiment
        expected = abstract_state(experiment.model, self.tx, experiment.train.coordinates)
        places = sharding.state_shardings(expected, experiment.model, self.tx, self.mesh)
        if not experiment.train.init_from:
            return jax.jit(lambda: init_state(initial_params(experiment), self.tx), out_shardings=places)()
        params = jax.device_put(initial_params(experiment), places.params)
        return jax.jit(lambda params: init_state(params, self.tx), out_shardings=places)(params)

    def steps(
        self,
        state: State,
        batches: grain.DatasetIterator,
        saved: checkpoints.Checkpoints,
        written: metrics.Metrics,
        progress: metrics.Progress,
        interrupts: Interrupts,
    ) -> State:
        settings = self.experiment.train
        log = _Log(self, written, progress)
        for step in range(int(state.step) + 1, settings.steps + 1):
            state, values = self.train_step(state, sharding.whole_batch(next(batches), self.mesh))
            log.dispatched(step, values)
            evaluating = _due(step, settings.eval_every, settings.steps)
            stopping = interrupts.received
            saving = stopping is not None or _due(step, settings.checkpoint_every, settings.steps)
            if evaluating or saving:
                # The rows up to this step are on disk before its checkpoint is: resuming there must not lose one.
                log.drain()
            if evaluating:
                held_out = self.evaluate(judged_params(state))
                written.write("eval", step, held_out)
                text = "  ".join(f"{name} {value:.4g}" for name, value in held_out.items())
                progress.say(f"step {step}/{settings.steps}  held out: {text}")
            if saving:
                saved.save(state, batches)
            if stopping is not None and step < settings.steps:
                raise Interrupted(step, stopping)
            if evaluating or saving:
                log.restart_clock()
        return state

    def evaluate(self, params: Params) -> dict[str, float]:
        """The task's summary over the held-out examples (or the first eval_examples of them, in a fixed order)."""
        return evaluate(self.experiment, self.splits.held_out, self.running(params), self.eval_step, self.mesh)


def evaluate(
    experiment: Experiment,
    held_out: data.Examples,
    running: Params,
    eval_step: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Means over the held-out examples, summed up in float64, of `running` parameters (what `models.running` returns).

    Args:
      eval_step: `make_eval_step(experiment.model, task)`; made here where it is not given.
      mesh: what `running` lies on; every process holds all of the examples.
    """
    settings, task = experiment.train, task_of(experiment)
    eval_step = eval_step or make_eval_step(experiment.model, task)
    batches = data.eval_batches(held_out, settings.eval_batch_size, settings.eval_examples)
    placed = (sharding.shared_batch(batch, mesh) if mesh else batch for batch in batches)
    sums = [jax.device_get(eval_step(running, batch)) for batch in placed]
    totals = {name: float(np.sum([part[name] for part in sums], dtype=np.float64)) for name in sums[0]}
    weight = totals.pop("weight")
    return task.summary({name: total / weight for name, total in totals.items()})


class _Log:
    """Rows of training steps. A step's values are fetched once the next step is dispatched, so that the device never
    waits."""

    def __init__(self, run: _Run, written: metrics.Metrics, progress: metrics.Progress) -> None:
        self.run, self.written, self.progress = run, written, progress
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        self.since, self.counted = time.perf_counter(), 0

    def dispatched(self, step: int, values: dict[str, jax.Array]) -> None:
        pending, self.pending = self.pending, (step, values)
        if pending:
            self.fetch(*pending)

    def drain(self) -> None:
        if self.pending:
            self.fetch(*self.pending)
        self.pending = None

    def fetch(self, step: int, values: dict[str, jax.Array]) -> None:
        settings = self.run.experiment.train
        fetched = {name: float(value) for name, value in jax.device_get(values).items()}
        if not np.isfinite(fetched["loss"]):
            raise FloatingPointError(f"the loss of step {step} is {fetched['loss']}; checkpoints before it are kept")
        self.counted += 1
        if not _due(step, settings.log_every, settings.steps):
            return
        seconds = (time.perf_counter() - self.since) / self.counted
        row = {
            **fetched,
            "learning_rate": float(self.run.learning_rates[step - 1]),
            "step_seconds": seconds,
            **_throughput(self.run.experiment, seconds),
        }
        self.written.write("train", step, row)
        self.progress.train(step, row)
        self.restart_clock()


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _throughput(experiment: Experiment, seconds: float) -> dict[str, float]:
    examples = experiment.train.batch_size / seconds
    if experiment.task == "language_modelling":
        return {"tokens_per_second": examples * experiment.model.context}  # type: ignore[union-attr]
    return {"images_per_second": examples}


def _announce(
    console: rich.console.Console,
    experiment: Experiment,
    workdir: pathlib.Path,
    state: State,
    splits: data.Splits,
    changed: list[str],
) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    model, step, steps = experiment.model, int(state.step), experiment.train.steps
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"{experiment.data.name}: {len(splits.train)} training and {len(splits.held_out)} held-out examples; "
        f"{model.norm}, width {model.width}, depth {model.depth}: {count:,} parameters in "
        f"{experiment.train.coordinates} coordinates"
    )
    if step >= steps:
        say(f"{workdir} holds a finished run ({step} steps)")
    elif step:
        say(f"resuming at step {step} of {steps} from {workdir}")
    if step and changed:
        say("changed since that checkpoint: " + "; ".join(changed))
