"""The two tasks: what a model takes and what its logits are judged by. A task gives values of each example; the step takes means."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.cross_entropy import cross_entropy
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
    """Next-token cross entropy over the first `vocab_size` columns of the logits; the padded columns are no tokens.

    logits: the dtype that the model computes its logits in, before it widens them.
    """

    vocab_size: int
    label_smoothing: float = 0.0
    unit: str = "token"
    logits: str = "float32"

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch

    def judge(self, logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """logits (B, L, padded_vocab) float, targets (B, L) int -> {"loss": (B,)}: means over tokens, in nats."""
        return {"loss": cross_entropy(logits, targets, self.vocab_size, self.label_smoothing, self.logits).mean(-1)}

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
    unit = "byte" if experiment.data.name == "stdlib" else "token"
    return LanguageModelling(model.vocab_size, smoothing, unit, model.dtype)


def without_smoothing(task: Task) -> Task:
    """The same task as it is evaluated: the likelihood of the targets themselves."""
    return dataclasses.replace(task, label_smoothing=0.0)
