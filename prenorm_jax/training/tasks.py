"""The two tasks: what logits are judged by. A task gives values of each example; the step takes means over batches."""

import dataclasses
import math

import jax

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.cross_entropy import cross_entropy
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
    """Next-token cross entropy over the first `vocab_size` columns of the logits; the padded columns are no tokens.

    logits: the dtype that the model computes its logits in, before it widens them.
    """

    vocab_size: int
    label_smoothing: float = 0.0
    unit: str = "token"
    logits: str = "float32"

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
        return ImageClassification(smoothing)
    assert isinstance(model, GPTConfig)
    unit = "byte" if experiment.data.name == "stdlib" else "token"
    return LanguageModelling(model.vocab_size, smoothing, unit, model.dtype)


def without_smoothing(task: Task) -> Task:
    """The same task as it is evaluated: the likelihood of the targets themselves."""
    return dataclasses.replace(task, label_smoothing=0.0)
