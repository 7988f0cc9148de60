"""The two tasks: what a model takes and what its logits are judged by. A task gives values of each example; the step takes means."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.mixing import mix
from prenorm_jax.training.pictures import AS_THEY_ARE, Pixels, pixels_of

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """Softmax or sigmoid cross entropy with label smoothing, and accuracy.

    classes: of mixed labels. pixels: what the model takes for values of 0 to 255.
    """

    label_smoothing: float = 0.0
    loss: str = "softmax"
    classes: int = 0
    pixels: Pixels = AS_THEY_ARE

    def prepare(self, batch: Batch) -> Batch:
        """What the model takes and `judge` compares with: pixels normalised where they are uint8; where the batch says how ("mix"),
        neighbours are mixed, and targets are then shares of the classes, (B, classes) float32."""
        batch = dict(batch)
        inputs = jnp.asarray(batch["inputs"])
        if inputs.dtype == jnp.uint8:
            mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (self.pixels.mean, self.pixels.std))
            inputs = (inputs.astype(jnp.float32) * jnp.float32(self.pixels.factor) - mean) / std
        if "mix" in batch:
            targets = jax.nn.one_hot(batch["targets"], self.classes, dtype=jnp.float32)
            inputs, batch["targets"] = mix(inputs, targets, jnp.asarray(batch.pop("mix")))
        return {**batch, "inputs": inputs}

    def judge(self, logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """logits (B, classes) float, targets (B,) int, or (B, classes) shares -> {"loss": (B,), "accuracy": (B,)} in the logits' dtype.

        Of mixed labels the largest share counts as the class.
        """
        whole = targets if targets.ndim == 1 else targets.argmax(-1)
        return {
            "loss": self._loss(logits, targets),
            "accuracy": (logits.argmax(-1) == whole).astype(logits.dtype),
        }

    def _loss(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        classes = logits.shape[-1]
        if self.loss == "softmax" and targets.ndim == 1:
            return cross_entropy(logits, targets, classes, self.label_smoothing)
        shares = targets if targets.ndim == 2 else jax.nn.one_hot(targets, classes)
        if self.loss == "sigmoid":
            shares = shares > 0  # a picture that two were mixed into shows both
            wanted = optax.smooth_labels(shares.astype(logits.dtype), self.label_smoothing)
            return optax.sigmoid_binary_cross_entropy(logits, wanted).mean(-1)
        wanted = optax.smooth_labels(shares.astype(logits.dtype), self.label_smoothing)
        return optax.safe_softmax_cross_entropy(logits, wanted)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What people report of mean values: loss and accuracy as they are."""
        return means


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Next-token cross entropy over the first `vocab_size` columns of the logits; the padded columns are no tokens."""

    vocab_size: int
    label_smoothing: float = 0.0
    unit: str = "token"

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch

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
        pixels = pixels_of(experiment.data, model.channels)
        return ImageClassification(smoothing, experiment.train.loss, model.classes, pixels)
    assert isinstance(model, GPTConfig)
    return LanguageModelling(model.vocab_size, smoothing, "byte" if experiment.data.name == "stdlib" else "token")


def without_smoothing(task: Task) -> Task:
    """The same task as it is evaluated: the likelihood of the targets themselves."""
    return dataclasses.replace(task, label_smoothing=0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(logits: jax.Array, targets: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """-sum_c q_c log softmax(logits)_c with q = (1 - smoothing) onehot(targets) + smoothing / classes.

    logits (..., C) float with C >= classes, of which the columns from `classes` on count for nothing; targets (...)
    int. Returns (...) in the logits' dtype.

    The gradient, softmax(logits) - q, is written from the logits and their log-sum-exp in one pass: no array of the logits' shape is
    kept but themselves, and logits that were widened for this are not stored wide.
    """
    return _cross_entropy(logits, targets, classes, smoothing)[0]


def _cross_entropy(
    logits: jax.Array, targets: jax.Array, classes: int, smoothing: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    # A mask fuses into the reductions; a slice would copy the logits to a width that the matrix units dislike.
    real = _columns(logits) < classes
    normaliser = jax.nn.logsumexp(jnp.where(real, logits, -jnp.inf), axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    loss = normaliser - (1 - smoothing) * target_logits
    if smoothing:
        loss -= smoothing * jnp.where(real, logits, 0).sum(-1) / classes
    return loss, (logits, targets, normaliser)


def _cross_entropy_gradient(
    classes: int, smoothing: float, kept: tuple[jax.Array, jax.Array, jax.Array], dloss: jax.Array
) -> tuple[jax.Array, None]:
    logits, targets, normaliser = kept
    columns = _columns(logits)
    wanted = jnp.where(columns == targets[..., None], 1 - smoothing, 0.0) + smoothing / classes
    gradient = jnp.exp(logits - normaliser[..., None]) - wanted.astype(logits.dtype)
    return jnp.where(columns < classes, gradient, 0) * dloss[..., None], None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def _columns(logits: jax.Array) -> jax.Array:
    """The index of each logit's column, shape of the logits."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
