"""Seeded noise of the model's own shapes: for timing, there is nothing to learn in it."""

import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import Batch, Splits
from prenorm_jax.training.experiment import Data


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """data.examples of them, and an eighth as many held out."""
    held_out = max(1, data.examples // 8)
    return Splits(Synthetic(model, data.seed, 0, data.examples), Synthetic(model, data.seed, 1, held_out))


class Synthetic:
    """`examples` images or token windows, each of which begins one place further in one run of noise."""

    def __init__(self, model: ViTConfig | GPTConfig, seed: int, split: int, examples: int) -> None:
        noise = np.random.default_rng((seed, split))
        self.examples = examples
        if isinstance(model, ViTConfig):
            self.shape: tuple[int, ...] = (model.image_size, model.image_size, model.channels)
            self.noise: np.ndarray = noise.uniform(-1, 1, size=int(np.prod(self.shape)) + examples).astype(np.float32)
            self.labels: np.ndarray | None = noise.integers(model.classes, size=examples, dtype=np.int32)
        else:
            self.shape, self.labels = (model.context,), None
            self.noise = noise.integers(model.vocab_size, size=model.context + examples, dtype=np.int32)

    def __len__(self) -> int:
        return self.examples

    def draws(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Nothing: there is no augmentation."""
        return np.zeros((count, 0))

    def batch(self, indices: np.ndarray, draws: np.ndarray | None) -> Batch:
        """Images or tokens, and their targets."""
        size = int(np.prod(self.shape))

        def windows(starts: np.ndarray) -> np.ndarray:
            return np.stack([self.noise[start : start + size] for start in starts]).reshape(-1, *self.shape)

        targets = windows(indices + 1) if self.labels is None else self.labels[indices]
        return {"inputs": windows(indices), "targets": targets}
