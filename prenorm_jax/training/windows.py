"""Windows of a GPT's context over a run of tokens, in memory or in a file."""

import dataclasses

import numpy as np

from prenorm_jax.training.data import Batch, DataError
from prenorm_jax.training.token_files import TokenFile


@dataclasses.dataclass(frozen=True)
class Windows:
    """tokens (N,) of integers, cut into windows of `context` inputs and the targets one further.

    Augmentation: a window starts anywhere between its own start and the next one's.

    vocab_size: ids below it; 0: whatever the tokens are.
    """

    tokens: np.ndarray | TokenFile
    context: int
    vocab_size: int = 0

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.context

    def draws(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """How much later than its own start each window starts, (count,)."""
        return rng.integers(self.context, size=count)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None) -> Batch:
        """Tokens (B, context) and the ones that follow them, int32. Raises: DataError for an id that the model has no row for."""
        starts = indices * self.context
        if draws is not None:
            starts = np.minimum(starts + draws, len(self.tokens) - self.context - 1)
        windows = self.tokens[starts[:, None] + np.arange(self.context + 1)]
        if self.vocab_size:
            require_ids(windows, self.vocab_size, getattr(self.tokens, "path", "the tokens"))
        windows = windows.astype(np.int32)
        return {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


def require_ids(ids: np.ndarray, vocab_size: int, where: object) -> None:
    """Raises DataError unless all ids are from 0 to vocab_size - 1."""
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        raise DataError(f"{where}: token ids from {least} to {most}; expected 0 to {vocab_size - 1}")
