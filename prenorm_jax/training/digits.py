"""scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels, ten classes."""

import dataclasses

import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import Batch, Splits
from prenorm_jax.training.experiment import Data


@dataclasses.dataclass(frozen=True)
class Digits:
    """images (N, 8, 8, 1), float32 from -1 (paper) to 1 (ink); labels (N,), int32.

    Augmentation: a shift of up to one pixel each way.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def draws(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """How far down and right, (count, 2) from 0 to 2: 1 is where it was."""
        return rng.integers(0, 3, size=(2, count)).T

    def batch(self, indices: np.ndarray, draws: np.ndarray | None) -> Batch:
        """Images (B, 8, 8, 1) and labels (B,)."""
        images = self.images[indices]
        if draws is not None:
            framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
            down, right = draws.T[..., None] + np.arange(8)
            images = framed[np.arange(len(indices))[:, None, None], down[:, :, None], right[:, None, :]]
        return {"inputs": images, "targets": self.labels[indices]}


def load(data: Data, model: ViTConfig | GPTConfig, held_out_fraction: float = 0.2) -> Splits:
    """A fixed stratified split: the same share of every class is held out, by a permutation that never changes."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this data set needs it

    scans = load_digits()
    images = (scans.images / 8 - 1).astype(np.float32)[..., None]
    labels = scans.target.astype(np.int32)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: round(held_out_fraction * len(members))]] = True
    return Splits(Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out]))
