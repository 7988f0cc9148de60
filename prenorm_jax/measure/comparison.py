"""What a run ends with: one set of weights in every form, the same answers, and what each step costs."""

import json
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from prenorm_jax import models
from prenorm_jax.main_branch import LayoutError
from prenorm_jax.measure import pictures, step_time
from prenorm_jax.measure.equivalence import FORMS, Form
from prenorm_jax.models import GPTConfig
from prenorm_jax.paths import Tree
from prenorm_jax.training import data
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.loop import evaluate
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.results import write_whole
from prenorm_jax.training.tasks import task_of

WORKS = ("training, pre_ln coordinates", "training, native", "inference")


def compare_variants(experiment: Experiment, params: Tree, workdir: pathlib.Path) -> dict[str, Any]:
    """Converts, evaluates and times the variants; prints the tables and writes compare.json, compare.md and compare.png.

    Args:
      params: in experiment.train.coordinates.

    Returns: what compare.json holds.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": _device(), "model": experiment.model.norm, "answers": {}, "times": {}}
    try:
        pre_ln = params_in_pre_ln(experiment, params)
        result["answers"] = answers(experiment, pre_ln)
    except LayoutError as error:
        result["no_answers"] = str(error)
        pre_ln = models.init(experiment.model, experiment.train.seed)
    times = timings(experiment, pre_ln)
    result["times"] = {
        work: {
            name: {"windows_s": list(found.windows), "ratio": found.against(row[step_time.BASELINE])}
            for name, found in row.items()
        }
        for work, row in times.items()
    }
    text = f"{answers_table(result)}\n\n{times_table(result)}\n"
    print(text)
    write_whole(workdir / "compare.json", json.dumps(result, indent=2) + "\n")
    write_whole(workdir / "compare.md", text)
    pictures.step_times(result["times"], workdir / "compare.png", f"step time, {result['device']}")
    print(f"written: {workdir / 'compare.json'}, compare.md, compare.png")
    return result


def params_in_pre_ln(experiment: Experiment, params: Tree) -> Tree:
    """Parameters as trained -> Pre-LN ones. Raises LayoutError where they have no Pre-LN equal."""
    return params if experiment.train.coordinates == "pre_ln" else models.pre_ln(params, experiment.model)


def answers(experiment: Experiment, params: Tree, forms: tuple[Form, ...] = FORMS) -> dict[str, dict[str, float]]:
    """Held-out metrics of forms of Pre-LN `params`, and how many predictions are those of the first of them."""
    held_out = data.load(experiment).held_out
    found: dict[str, dict[str, float]] = {}
    reference = None
    for form in forms:
        config = form.of(experiment.model)
        # On concrete weights the chart is computed in float64 and rounded once, as for a checkpoint that is converted.
        running = models.running(params, config)
        of_form = Experiment(**{**vars(experiment), "model": config})
        predicted = predictions(of_form, held_out, running)
        reference = predicted if reference is None else reference
        found[form.name] = {
            **evaluate(of_form, held_out, running),
            "predictions": float(predicted.size),
            "same_predictions": float((predicted == reference).sum()),
        }
    return found


def predictions(experiment: Experiment, held_out: data.Examples, running: Tree) -> np.ndarray:
    """The likeliest class of every held-out example, or the likeliest next token of every position; flat."""
    config, settings, task = experiment.model, experiment.train, task_of(experiment)

    @jax.jit
    def predict(running: Tree, batch: data.Batch) -> jax.Array:
        logits, _ = models.apply(config, running, task.prepare(batch)["inputs"], only_read=True)
        return (logits[..., : config.vocab_size] if isinstance(config, GPTConfig) else logits).argmax(-1)

    batches = data.eval_batches(held_out, settings.eval_batch_size, settings.eval_examples, experiment.data)
    parts = [np.asarray(predict(running, batch))[batch["weights"] > 0].ravel() for batch in batches]
    return np.concatenate(parts)


def timings(experiment: Experiment, params: Tree) -> dict[str, dict[str, step_time.Times]]:
    """Times of a step by kind of work and row of `step_time.TIMED`: training in both coordinates, and inference, on a training batch."""
    settings, task = experiment.train, task_of(experiment)
    tx = make_optimizer(experiment.optimizer, settings.steps)
    batches = data.train_batches(data.load(experiment).train, experiment.data, settings.batch_size)
    batch = next(batches)
    batches.close()
    windows = {name: getattr(experiment.compare, name) for name in ("warmup_steps", "window_steps", "windows")}

    def case(work: str, form: step_time.Form) -> step_time.Case:
        config = form.of(experiment.model)
        if work == "inference":
            # Mapped and rounded to the dtype of the computation once, as one would to serve it.
            running = jax.jit(lambda params: _rounded(models.running(params, config), config.dtype))(params)
            return step_time.inference_case(config, running, task.prepare(batch)["inputs"])
        native = work == "training, native"
        own = jax.jit(lambda params: models.native(params, config))(params) if native else params
        coordinates = "native" if native else "pre_ln"
        return step_time.training_case(
            config, own, task, tx, batch, coordinates=coordinates, accumulate=settings.accumulate
        )

    return {
        work: step_time.interleaved({name: case(work, form) for name, form in step_time.TIMED.items()}, **windows)
        for work in WORKS
    }


def answers_table(result: dict[str, Any]) -> str:
    """Markdown: a row a form, its held-out metrics, and how many predictions are the Pre-LN model's."""
    if "no_answers" in result:
        return f"No equivalence table: {result['no_answers']}"
    rows = result["answers"]
    names = [name for name in next(iter(rows.values())) if name not in ("predictions", "same_predictions")]
    lines = [f"| same weights, as | {' | '.join(names)} | same predictions |", "|---" * (len(names) + 2) + "|"]
    for form, row in rows.items():
        values = " | ".join(f"{row[name]:.6g}" for name in names)
        lines.append(f"| {form} | {values} | {row['same_predictions']:.0f} of {row['predictions']:.0f} |")
    return "\n".join(lines)


def times_table(result: dict[str, Any]) -> str:
    """Markdown: a row a form; milliseconds (median), and the ratio to pre_ln: median (least to greatest of the windows)."""
    works = result["times"]
    lines = [f"| step time, {result['device']} | {' | '.join(works)} |", "|---" * (len(works) + 1) + "|"]
    for name in next(iter(works.values())):
        cells = []
        for row in works.values():
            median, least, greatest = row[name]["ratio"]
            ms = 1e3 * float(np.median(row[name]["windows_s"]))
            cells.append(f"{ms:.2f} ms, {median:.3f} ({least:.3f} to {greatest:.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rounded(params: Tree, dtype: str) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}, {platform.machine()}), jax {jax.__version__}"
