"""The one training loop: resume, train, evaluate, checkpoint, and the summary at the end."""

import contextlib
import dataclasses
import json
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import rich.console

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError, require
from prenorm_jax.training import boards, checkpoints, data, distributed, metrics, results, saving, sharding, summary
from prenorm_jax.training.disk import full_disks_told, is_full, removed_workdirs_told
from prenorm_jax.training.experiment import Experiment, as_tree
from prenorm_jax.training.guards import Guard
from prenorm_jax.training.initial import initial_params
from prenorm_jax.training.interrupts import Interrupted, Interrupts, Received
from prenorm_jax.training.lock import locked, refuse_in_use
from prenorm_jax.training.log import Log
from prenorm_jax.training.lost import lost_processes_told
from prenorm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from prenorm_jax.training.platforms import require_platform
from prenorm_jax.training.profile import Profile
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

    Writes into `workdir`: config.json, metrics.jsonl, tensorboard/, checkpoints/, lock, and at the end summary.json,
    summary.md and curves.png; where asked for profile/ and wandb's files. Evaluates on the held-out examples every
    eval_every steps and after the last one. On one platform the same experiment gives the same bits, however often it
    was interrupted. Of several processes, all call this with the same arguments; the first one writes.

    Returns: the trained parameters, or their moving average where one is kept, in experiment.train.coordinates.
    Raises:
      ConfigError: the workdir holds another model's checkpoint, one in other coordinates or, unfinished, of a later step than the
        last, or the record of a finished run without its checkpoints; another process uses it; the processes of a run differ in
        what they were given; the model is `no_norm`; a library that was asked for is missing. Nothing is written.
      DataError: the data can't be read. Where it could not from the start, nothing is written.
      NotFinite: a loss or a gradient is not finite, and no more steps may be skipped.
      ProcessLost: another process of the run is gone.
      DiskFull: there is no space left; what was complete is kept.
      Interrupted: SIGINT or SIGTERM; the step under way was finished and saved, an evaluation under way was not finished.
    """
    first = jax.process_index() == 0
    console = console or rich.console.Console(quiet=not first)
    require(
        experiment.model.norm != "no_norm", "config.model.norm", "no_norm", "a norm: no_norm is a control for timing"
    )
    require_platform(experiment.model)
    boards.require_libraries(experiment)
    if first:  # before its checkpoints are read, which another run would be writing and removing
        refuse_in_use(workdir)
    changed = checkpoints.refuse_other_model(workdir, experiment)
    splits, newest = data.load(experiment), _newest(workdir, experiment)
    examples = {"training": len(splits.train), "held out": len(splits.held_out)}
    said = {"config": as_tree(experiment), "--workdir": str(workdir.absolute())}
    distributed.require_same({**said, "newest checkpoint": newest, "examples": examples})
    run = _Run(experiment, splits, begins=newest is None)
    batches = data.train_batches(splits.train, experiment.data, experiment.train.batch_size, *sharding.share(run.mesh))

    with full_disks_told(workdir), removed_workdirs_told(workdir), contextlib.ExitStack() as stack:
        _make(workdir)
        if first:
            stack.enter_context(locked(workdir))
        saved = stack.enter_context(saving.Checkpoints(workdir, experiment))
        stack.callback(batches.close)
        restored = saved.restore(run.initial_state(), batches)
        start, settings = int(restored.state.step), experiment.train
        _announce(console, experiment, workdir, restored, splits, changed)
        # Of a finished run nothing is written anew: its record is of what it was trained with, whatever it is started with now.
        unfinished = start < settings.steps
        if first and (unfinished or not (workdir / "config.json").exists()):
            results.write_whole(workdir / "config.json", json.dumps(as_tree(experiment), indent=2) + "\n")
        rows = metrics.Metrics(workdir, start, experiment) if first else metrics.Nowhere()
        written = stack.enter_context(rows)
        progress = stack.enter_context(metrics.Progress(console, start, settings.steps))
        guard = Guard(settings.skip_nonfinite, restored.skipped)
        log = Log(experiment, run.learning_rates, guard, written, progress, run.mesh.devices.flat)
        profile = stack.enter_context(contextlib.closing(Profile(workdir, settings.profile)))
        interrupts = stack.enter_context(Interrupts())
        with lost_processes_told():  # before anything is closed that would wait for it
            owed = start > 0 and not restored.evaluated and settings.due(start, settings.eval_every)
            # The evaluation at that checkpoint failed, or was left.
            if owed and run.evaluated(restored.state, log, interrupts) is None:
                raise Interrupted(start, interrupts.now or signal.SIGTERM)
            state = run.steps(restored.state, batches, saved, log, guard, profile, interrupts)
        if first and (unfinished or not (workdir / "summary.json").exists()):
            summary.write(workdir, experiment)
        if interrupts.now is not None:
            raise Interrupted(settings.steps, interrupts.now)
    return judged_params(state)


class _Run:
    """The compiled functions of one experiment, and the order in which the loop calls them."""

    def __init__(self, experiment: Experiment, splits: data.Splits, *, begins: bool = True) -> None:
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
            stochastic_depth=settings.stochastic_depth,
            seed=settings.seed,
        )
        self.eval_step = make_eval_step(model, self.task, self.mesh)
        self.running = jax.jit(lambda params: models.running(params, model, settings.coordinates))
        # All at once: a schedule asked step by step would queue its arithmetic behind the training step on the device.
        schedule = learning_rate_schedule(experiment.optimizer, settings.steps)
        self.learning_rates = np.asarray(jax.vmap(schedule)(np.arange(settings.steps)))
        # A run that goes on needs nothing of what it began with.
        self._begins_with = initial_params(experiment) if settings.init_from and begins else None

    def initial_state(self) -> State:
        """The state before the first step, each leaf made where the mesh has it."""
        experiment = dataclasses.replace(
            self.experiment, train=dataclasses.replace(self.experiment.train, init_from="")
        )
        expected = abstract_state(experiment.model, self.tx, experiment.train.coordinates)
        places = sharding.state_shardings(expected, experiment.model, self.tx, self.mesh)
        if self._begins_with is None:
            return jax.jit(lambda: init_state(initial_params(experiment), self.tx), out_shardings=places)()
        params = jax.device_put(self._begins_with, places.params)
        self._begins_with = None
        return jax.jit(lambda params: init_state(params, self.tx), out_shardings=places)(params)

    def steps(
        self,
        state: State,
        batches: grain.DatasetIterator,
        saved: saving.Checkpoints,
        log: Log,
        guard: Guard,
        profile: Profile,
        interrupts: Interrupts,
    ) -> State:
        settings = self.experiment.train
        for step in range(int(state.step) + 1, settings.steps + 1):
            batch = sharding.whole_batch(next(batches), self.mesh)
            with profile.step(step):
                state, values = self.train_step(state, batch)
            log.dispatched(step, values)
            log.say(profile.dispatched(step, values))
            saved.check()
            stopping = interrupts.stop_behind(step)
            saving = stopping is not None or settings.due(step, settings.checkpoint_every)
            evaluating = settings.due(step, settings.eval_every) or (
                saving and stopping is None and settings.keep_best > 0
            )
            if not (evaluating or saving):
                continue
            # The rows up to this step are on disk before its checkpoint is: resuming there must not lose one.
            log.drain()
            held_out = None
            if evaluating:
                try:
                    held_out = self.evaluated(state, log, interrupts)
                except Exception:
                    if jax.process_count() == 1:  # of several, the others are not here to save
                        saved.save(state, batches, guard.skipped)
                    raise
                stopping = stopping or interrupts.now
            if saving or stopping is not None:
                saved.save(state, batches, guard.skipped, held_out)
            if stopping is not None and (step < settings.steps or held_out is None):
                raise Interrupted(step, stopping)
            log.restart_clock()
        return state

    def evaluated(self, state: State, log: Log, interrupts: Interrupts) -> dict[str, float] | None:
        """Evaluates a state, and says so; None where a signal came before that was done."""
        try:
            held_out = self.evaluate(judged_params(state), interrupts.leave)
        except Received:
            return None
        log.evaluated(int(state.step), held_out)
        return held_out

    def evaluate(self, params: Params, between: Callable[[], None]) -> dict[str, float]:
        """The task's summary over the held-out examples (or the first eval_examples of them, in a fixed order)."""
        running = self.running(params)
        return evaluate(self.experiment, self.splits.held_out, running, self.eval_step, self.mesh, between)


def evaluate(
    experiment: Experiment,
    held_out: data.Examples,
    running: Params,
    eval_step: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over the held-out examples, summed up in float64, of `running` parameters (what `models.running` returns).

    Args:
      eval_step: `make_eval_step(experiment.model, task)`; made here where it is not given.
      mesh: what `running` lies on; each process reads its share of the examples.
      between: called before each batch, and may raise.
    """
    settings, task = experiment.train, task_of(experiment)
    eval_step = eval_step or make_eval_step(experiment.model, task)
    share = sharding.share(mesh) if mesh else (0, 1)
    batches = data.eval_batches(held_out, settings.eval_batch_size, settings.eval_examples, experiment.data, *share)
    placed = (sharding.whole_batch(batch, mesh) if mesh else batch for batch in batches)
    sums = []
    for batch in placed:
        between()
        sums.append(jax.device_get(eval_step(running, batch)))
    totals = {name: float(np.sum([part[name] for part in sums], dtype=np.float64)) for name in sums[0]}
    weight = totals.pop("weight")
    return task.summary({name: total / weight for name, total in totals.items()})


def _newest(workdir: pathlib.Path, experiment: Experiment) -> int | None:
    """The step of the newest checkpoint. Raises: ConfigError for a workdir whose checkpoints or record this run would get in the way of."""
    found, folder = checkpoints.latest(workdir), checkpoints.folder(workdir)
    require(folder.is_dir() or not folder.exists(), "--workdir", folder, "a folder of that name, or none")
    finished = (workdir / "summary.json").exists()
    if found is None:
        allowed = (
            "another folder, or that one emptied: it holds the record of a finished run, but none of its checkpoints"
        )
        require(not finished, "--workdir", workdir, allowed)
        return None
    steps = experiment.train.steps
    require(
        finished or found[0] <= steps,
        "config.train.steps",
        steps,
        f"{found[0]} or more, the step that {workdir} has reached",
    )
    return found[0]


def _make(workdir: pathlib.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            raise
        raise ConfigError(
            f"--workdir: cannot make {workdir} ({error.strerror}); allowed: a folder that can be written"
        ) from error


def _announce(
    console: rich.console.Console,
    experiment: Experiment,
    workdir: pathlib.Path,
    restored: saving.Restored,
    splits: data.Splits,
    changed: list[str],
) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    model, step, steps = experiment.model, int(restored.state.step), experiment.train.steps
    count = sum(leaf.size for leaf in jax.tree.leaves(restored.state.params))
    say(
        f"{experiment.data.name}: {len(splits.train)} training and {len(splits.held_out)} held-out examples; "
        f"{model.norm}, width {model.width}, depth {model.depth}: {count:,} parameters in "
        f"{experiment.train.coordinates} coordinates"
    )
    for note in restored.notes:
        say(note)
    if step >= steps:
        say(f"{workdir} holds a finished run ({step} steps)")
    elif step:
        say(f"resuming at step {step} of {steps} from {workdir}")
    if step and changed:
        say("changed since that checkpoint: " + "; ".join(changed))
