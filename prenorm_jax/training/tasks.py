"""The two tasks: what logits are judged by. A task gives values of each example; the step takes means over batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """Softmax cross entropy with label smoothing, and accuracy."""

    label_smoothing: float = 0.0

    def judge(self, logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """logits (B, classes) float, targets (B,) int -> {"loss": (B,), "accuracy": (B,)} in the logits' dtype."""
        return {
            "loss": cross_entropy(logits, targets, logits.shape[-1], self.label_smoothing),
            "accuracy": (logits.argmax(-1) == targets).astype(logits.dtype),
        }

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What people report of mean values: loss and accuracy as they are."""
        return means


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Next-token cross entropy over the first `vocab_size` columns of the logits; the padded columns are no tokens."""

    vocab_size: int
    label_smoothing: float = 0.0
    unit: str = "token"

    def judge(self, logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """logits (B, L, padded_vocab) float, targets (B, L) int -> {"loss": (B,)}: means over tokens, in nats."""
        return {"loss": cross_entropy(logits, targets, self.vocab_size, self.label_smoothing).mean(-1)}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds perplexity and bits per token (or byte) to mean values that hold "loss" in nats."""
        loss = means["loss"]
        # A loss that has run away must not stop the run with an OverflowError.
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {**means, "perplexity": perplexity, f"bits_per_{self.unit}": loss / math.log(2)}


Task = ImageClassification | LanguageModelling


def task_of(experiment: Experiment) -> Task:
    """The task that the experiment trains on."""
    model, smoothing = experiment.model, experiment.train.label_smoothing
    if isinstance(model, ViTConfig):
        return ImageClassification(smoothing)
    assert isinstance(model, GPTConfig)
    return LanguageModelling(model.vocab_size, smoothing, "byte" if experiment.data.name == "stdlib" else "token")


def without_smoothing(task: Task) -> Task:
    """The same task as it is evaluated: the likelihood of the targets themselves."""
    return dataclasses.replace(task, label_smoothing=0.0)


def cross_entropy(logits: jax.Array, targets: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """-sum_c q_c log softmax(logits)_c with q = (1 - smoothing) onehot(targets) + smoothing / classes.

    logits (..., C) float with C >= classes, of which the columns from `classes` on count for nothing; targets (...)
    int. Returns (...) in the logits' dtype.
    """
    padded = logits.shape[-1] > classes
    if padded:
        # A mask fuses into the reductions; a slice would copy the logits to a width that the matrix units dislike.
        real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < classes
        logits = jnp.where(real, logits, -jnp.inf)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    if smoothing == 0:
        return normaliser - target_logits
    mean_logits = (jnp.where(real, logits, 0) if padded else logits).sum(-1) / classes
    return normaliser - (1 - smoothing) * target_logits - smoothing * mean_logits
