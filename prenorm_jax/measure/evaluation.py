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
from prenorm_jax.training.loop import evaluate
from prenorm_jax.training.tasks import task_of

ORACLE_EXAMPLES = 64  # what the float64 oracle sees: the more, the longer it takes


def evaluate_checkpoint(workdir: pathlib.Path, forms: tuple[str, ...] = ()) -> list[str]:
    """Evaluates the newest checkpoint of a workdir and writes equivalence.json, .md and .png beside it.

    Args:
      forms: names of `equivalence.FORMS` to evaluate on the held-out examples; none means all.

    Returns: what does not hold, a line each; empty if the forms are the same function.
    Raises: FileNotFoundError without a checkpoint; ConfigError for an unknown form.
    """
    known = {form.name: form for form in equivalence.FORMS}
    for name in forms:
        require_one_of("--forms", name, tuple(known))
    loaded = checkpoints.load(workdir)
    experiment, config = loaded.experiment, loaded.experiment.model
    print(f"{workdir}, step {loaded.step}: {config.norm}, trained in {loaded.coordinates} coordinates")
    try:
        params = comparison.params_in_pre_ln(experiment, loaded.params)
    except LayoutError as error:
        # Trained as an RMSNorm model in its own right: it is what it is, and has no other form.
        found = evaluate(experiment, data.load(experiment).held_out, models.running(loaded.params, config, "native"))
        print("  ".join(f"{name} {value:.6g}" for name, value in found.items()))
        return [f"no other form is the same function: {error}"]

    result = {
        "answers": comparison.answers(experiment, params, tuple(known[name] for name in forms) or equivalence.FORMS)
    }
    print(comparison.answers_table(result))
    report = _report(experiment, params)
    text = f"{comparison.answers_table(result)}\n\n{report.as_markdown()}\n"
    print(f"\n{report.as_markdown()}")
    (workdir / "equivalence.json").write_text(json.dumps({**result, **report.as_json()}, indent=2) + "\n")
    (workdir / "equivalence.md").write_text(text)
    title = (
        f"{experiment.data.name}, width {config.width}, depth {config.depth}: errors against the float64 Pre-LN oracle"
    )
    pictures.equivalence(report.as_json()["errors"], workdir / "equivalence.png", title)
    print(f"\nwritten: {workdir / 'equivalence.json'}, equivalence.md, equivalence.png")
    return report.failures


def _report(experiment: Experiment, params: Tree) -> equivalence.Report:
    held_out = data.load(experiment).held_out
    count = min(ORACLE_EXAMPLES, len(held_out))
    batch = next(iter(data.eval_batches(held_out, count, count)))
    task = task_of(experiment)

    def loss(logits: jax.Array) -> jax.Array:
        return task.judge(logits, jnp.asarray(batch["targets"]))["loss"].mean()

    return equivalence.compare(experiment.model, params, batch["inputs"], loss)


def write_text(workdir: pathlib.Path, prompt: str, new_tokens: int, temperature: float, top_k: int | None) -> str:
    """The prompt and its continuation by a checkpoint of a byte-level GPT. Raises ConfigError for another model."""
    loaded = checkpoints.load(workdir)
    config = loaded.experiment.model
    if not isinstance(config, GPTConfig) or config.vocab_size != 256:
        raise ConfigError(f"--prompt: got a checkpoint of {loaded.experiment.data.name}; allowed: a byte-level GPT")
    require(len(prompt) > 0, "--prompt", prompt, "at least one character")
    tokens = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8), jnp.int32)[None]
    running = models.running(loaded.params, config, loaded.coordinates)
    key = jax.random.key(loaded.experiment.train.seed)
    out = generate(config, running, tokens, new_tokens, temperature=temperature, top_k=top_k, key=key)
    return bytes(np.asarray(out[0], np.uint8)).decode(errors="replace")
