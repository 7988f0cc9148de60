"""Does the fast step learn what the slow one learns? Training steps in the timed configuration beside a plain reference in float32.

    python -m prenorm_jax.measure track vit B/16 --batch 32 --steps 200 --json results/speed/tracking.json

All begin with the same Pre-LN parameters, see the same batches, again and again, and train in Pre-LN coordinates, so that in exact
arithmetic all have one trajectory. The reference is the Pre-LN model in float32 with full-precision products, looped layers and attention
as XLA computes it. What a trajectory may miss it by is measured, not chosen: `plain` is the same plain Pre-LN program in the timed dtype,
run several times from parameters that differ by less than they are rounded by, since one run is one draw of what roundings do. A form
passes if the losses of its timed step miss the reference's by at most `ALLOWED` times what those of the furthest plain run do, root mean
square over the steps. The negative control is plain with a learning rate a tenth higher: it has to miss by more than that.
"""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import models
from prenorm_jax.measure import step_time
from prenorm_jax.measure.equivalence import FORMS, PRE_LN, Config
from prenorm_jax.measure.works import Work
from prenorm_jax.models.config import require
from prenorm_jax.training.experiment import Optimizer
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.results import save_beside
from prenorm_jax.training.step import State, init_state, make_train_step

ALLOWED = 2.0
Program = tuple[Config, str, float]
"""Config, precision of products, learning rate."""
PLAIN = ("plain", "plain, nudged", "plain, nudged again")
NUDGE = 2.0**-14  # of a parameter, at most: in bfloat16 one of two hundred is rounded otherwise
BATCHES = 8  # so few that they are learnt by heart
# At 1e-3, and for ViT-B at 1e-4, what a model makes of roundings is no smaller than what the control makes of its rate
# (docs/performance-log.md).
LEARNING_RATE = 1e-5


def measure(
    work: Work, steps: int, say: Callable[[str], None], threads: int = 1, learning_rate: float = LEARNING_RATE
) -> dict[str, Any]:
    """The losses of every trajectory, by its name. What `table` prints and `passes` judges.

    Args:
      learning_rate: of AdamW, behind a tenth of the steps as warm-up.
      threads: how many programs are compiled at a time, while those that are ready run.

    Raises: ConfigError for a work that does not train, or too few steps to warm up.
    """
    require(work.kind == "training", "work.kind", work.kind, "training")
    require(steps >= 20, "--steps", steps, "20 or more")
    plain = PRE_LN.of(work.model, attention="xla", scan_layers=False, unroll=False)
    params = jax.tree.map(np.asarray, models.init(plain, 0))
    batches = [jax.device_put(work.data(seed)) for seed in range(BATCHES)]
    of_plain: Program = (plain, "default", learning_rate)
    trajectories: dict[str, Program] = {
        "reference": (dataclasses.replace(plain, dtype="float32"), "highest", learning_rate),
        **dict.fromkeys(PLAIN, of_plain),
        **{form.name: (form.of(work.model), "default", learning_rate) for form in FORMS},
        "control": (plain, "default", 1.1 * learning_rate),
    }
    losses = {}
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        ready = {
            program: pool.submit(_compiled, work, *program, params, steps)
            for program in dict.fromkeys(trajectories.values())
        }
        for name, program in trajectories.items():
            start = _nudged(params, PLAIN.index(name)) if name in PLAIN else params
            losses[name] = _train(*ready[program].result(), start, batches, steps)
            say(f"{name}: loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}")
    finally:
        pool.shutdown(cancel_futures=True)
    return {
        "tracked": work.key,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "learning_rate": learning_rate,
        "losses": losses,
    }


def _nudged(params: Any, times: int) -> Any:
    """Parameters times numbers from 1 - NUDGE to 1 + NUDGE: one draw of them for each of `times`, none for 0."""
    if not times:
        return params
    rng = np.random.default_rng(times)
    return jax.tree.map(lambda leaf: leaf * (1 + NUDGE * rng.uniform(-1, 1, leaf.shape)).astype(leaf.dtype), params)


Start = Callable[[Any], State]


def _compiled(
    work: Work, config: Config, precision: str, rate: float, params: Any, steps: int
) -> tuple[Callable[..., Any], Start]:
    """A compiled step, and what makes the state before the first one of Pre-LN parameters on the host."""
    tx = make_optimizer(Optimizer(learning_rate=rate, warmup_steps=steps // 10), steps)

    def start(params: Any) -> State:
        return init_state(jax.tree.map(jnp.array, models.stack_layers(params) if config.scan_layers else params), tx)

    with jax.default_matmul_precision(precision):
        train_step = make_train_step(config, work.task, tx, coordinates="pre_ln")
        step, _ = step_time.compiled(train_step, jax.eval_shape(start, params), work.data())
    return step, start


def _train(
    step: Callable[..., Any], start: Start, params: Any, batches: list[dict[str, Any]], steps: int
) -> list[float]:
    state, found = start(params), []
    for index in range(steps):
        state, values = step(state, batches[index % len(batches)])
        found.append(values["loss"])
    return [float(loss) for loss in jax.device_get(found)]


def misses(losses: Mapping[str, list[float]]) -> dict[str, float]:
    """What each trajectory's losses miss the reference's by, root mean square over the steps.

    >>> misses({"reference": [2.0, 1.0], "plain": [2.0, 1.0], "pre_ln": [2.5, 1.5]})
    {'plain': 0.0, 'pre_ln': 0.5}
    """
    reference = np.array(losses["reference"])
    return {
        name: float(np.sqrt(np.mean(np.square(np.array(found) - reference))))
        for name, found in losses.items()
        if name != "reference"
    }


def passes(result: Mapping[str, Any]) -> bool:
    """Whether every form tracks the reference, and the control does not."""
    found = misses(result["losses"])
    allowed = ALLOWED * _furthest_plain(found)
    return found["control"] > allowed and all(found[form.name] <= allowed for form in FORMS)


def _furthest_plain(found: Mapping[str, float]) -> float:
    return max(found[name] for name in PLAIN if name in found)


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row a trajectory: its loss along the way, and what it misses the reference by, also as a multiple of the furthest plain
    run's."""
    losses = result["losses"]
    steps = len(losses["reference"])
    shown = [1, steps // 4, steps // 2, steps]
    found = misses(losses)
    lines = [
        f"{result['tracked']}, {result['device']}, jax {result['jax']}: {steps} steps in Pre-LN coordinates, "
        f"learning rate {result['learning_rate']:g}",
        "",
        f"| trajectory | {' | '.join(f'loss at {step}' for step in shown)} | misses the reference by | of plain's |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for name, each in losses.items():
        cells = [f"{each[step - 1]:.4f}" for step in shown]
        missed = [f"{found[name]:.2e}", f"{found[name] / _furthest_plain(found):.2f}"] if name in found else ["", ""]
        lines.append(f"| {name} | {' | '.join([*cells, *missed])} |")
    return "\n".join(lines)


def save(result: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a result, beside those of other works and other rates that the file holds."""
    save_beside(path, "tracking", [result], lambda each: (each["tracked"], each["learning_rate"]))
