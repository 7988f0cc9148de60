"""A checkpoint, evaluated in its forms, with the report that they are one function."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import models
from prenorm_jax.main_branch import LayoutError
from prenorm_jax.measure import comparison, equivalence, pictures
from prenorm_jax.models import GPTConfig
from prenorm_jax.models.config import ConfigError, require, require_one_of
from prenorm_jax.models.generate import generate
from prenorm_jax.paths import Tree
from prenorm_jax.training import checkpoints, data
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.initial import initial_params
from prenorm_jax.training.loop import evaluate
from prenorm_jax.training.results import write_whole
from prenorm_jax.training.tasks import task_of

ORACLE_EXAMPLES, ORACLE_TOKENS = 64, 8192  # what the float64 oracle sees at most: the more, the longer it takes


def evaluate_checkpoint(workdir: pathlib.Path, forms: tuple[str, ...] = (), best: bool = False) -> list[str]:
    """Evaluates the newest checkpoint of a workdir, or the best one on disk, as `evaluate_params` does: as in
    training, the moving average of its weights where one was kept.

    Raises: FileNotFoundError without a checkpoint; ConfigError for an unknown form, and for the best of none.
    """
    chosen, loaded = _forms(forms), _loaded(workdir, best)
    experiment, config, average = loaded.experiment, loaded.experiment.model, loaded.experiment.optimizer.average
    judged = f"; judged is the moving average of its weights (config.optimizer.average = {average})" if average else ""
    print(f"{workdir}, step {loaded.step}: {config.norm}, trained in {loaded.coordinates} coordinates{judged}")
    return evaluate_params(experiment, loaded.params, workdir, chosen)


def _loaded(workdir: pathlib.Path, best: bool) -> checkpoints.Loaded:
    step = checkpoints.best(workdir) if best else None
    if best and step is None and checkpoints.latest(workdir):
        raise ConfigError(
            f"--best: no checkpoint of {workdir} has an evaluation; allowed: without --best, or a run with train.keep_best"
        )
    return checkpoints.load(workdir, step=step)


def evaluate_import(experiment: Experiment, workdir: pathlib.Path, forms: tuple[str, ...] = ()) -> list[str]:
    """Evaluates the imported checkpoint that an experiment begins with, as `evaluate_params` does.

    Raises: ConfigError for an experiment that begins with none, or an unknown form.
    """
    chosen, origin = _forms(forms), experiment.train.init_from
    require(bool(origin), "config.train.init_from", origin, "a folder that `prenorm import` wrote")
    params = initial_params(experiment)
    print(f"{origin}: width {experiment.model.width}, depth {experiment.model.depth}, on {experiment.data.root}")
    workdir.mkdir(parents=True, exist_ok=True)
    return evaluate_params(experiment, params, workdir, chosen)


def evaluate_params(
    experiment: Experiment, params: Tree, workdir: pathlib.Path, forms: tuple[equivalence.Form, ...]
) -> list[str]:
    """Evaluates parameters in their forms and writes equivalence.json, .md and .png into the workdir.

    Args:
      params: in experiment.train.coordinates.
      forms: to evaluate on the held-out examples.

    Returns: what does not hold, a line each; empty if the forms are the same function.
    """
    config = experiment.model
    try:
        params = comparison.params_in_pre_ln(experiment, params)
    except LayoutError as error:
        # Trained as an RMSNorm model in its own right: it is what it is, and has no other form.
        found = evaluate(experiment, data.load(experiment).held_out, models.running(params, config, "native"))
        print("  ".join(f"{name} {value:.6g}" for name, value in found.items()))
        return [f"no other form is the same function: {error}"]

    result = {"answers": comparison.answers(experiment, params, forms)}
    print(comparison.answers_table(result))
    report = _report(experiment, params)
    text = f"{comparison.answers_table(result)}\n\n{report.as_markdown()}\n"
    print(f"\n{report.as_markdown()}")
    write_whole(workdir / "equivalence.json", json.dumps({**result, **report.as_json()}, indent=2) + "\n")
    write_whole(workdir / "equivalence.md", text)
    title = (
        f"{experiment.data.name}, width {config.width}, depth {config.depth}: errors against the float64 Pre-LN oracle"
    )
    pictures.equivalence(report.as_json()["errors"], workdir / "equivalence.png", title)
    print(f"\nwritten: {workdir / 'equivalence.json'}, equivalence.md, equivalence.png")
    return report.failures


def _forms(names: tuple[str, ...]) -> tuple[equivalence.Form, ...]:
    known = {form.name: form for form in equivalence.FORMS}
    for name in names:
        require_one_of("--forms", name, tuple(known))
    return tuple(known[name] for name in names) or equivalence.FORMS


def _report(experiment: Experiment, params: Tree) -> equivalence.Report:
    held_out = data.load(experiment).held_out
    model = experiment.model
    tokens = model.context if isinstance(model, GPTConfig) else model.tokens
    count = min(ORACLE_EXAMPLES, max(1, ORACLE_TOKENS // tokens), len(held_out))
    task = task_of(experiment)
    batch = task.prepare(next(iter(data.eval_batches(held_out, count, count))))

    def loss(logits: jax.Array) -> jax.Array:
        return task.judge(logits, jnp.asarray(batch["targets"]))["loss"].mean()

    return equivalence.compare(experiment.model, params, np.asarray(batch["inputs"]), loss)


def write_text(
    workdir: pathlib.Path, prompt: str, new_tokens: int, temperature: float, top_k: int | None, best: bool = False
) -> str:
    """The prompt and its continuation by a checkpoint of a byte-level GPT: the newest, or the best on disk. Raises ConfigError for another
    model."""
    try:
        written = np.frombuffer(prompt.encode(), np.uint8)
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt: got {prompt!r}; allowed: text") from None
    loaded = _loaded(workdir, best)
    config = loaded.experiment.model
    if not isinstance(config, GPTConfig) or config.vocab_size != 256:
        raise ConfigError(f"--prompt: got a checkpoint of {loaded.experiment.data.name}; allowed: a byte-level GPT")
    require(len(prompt) > 0, "--prompt", prompt, "at least one character")
    tokens = jnp.asarray(written, jnp.int32)[None]
    running = models.running(loaded.params, config, loaded.coordinates)
    key = jax.random.key(loaded.experiment.train.seed)
    out = generate(config, running, tokens, new_tokens, temperature=temperature, top_k=top_k, key=key)
    return bytes(np.asarray(out[0], np.uint8)).decode(errors="replace")
