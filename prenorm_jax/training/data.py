"""Data sets that need no download, and the grain pipelines that turn them into batches.

A data set is a length and a function (index, rng) -> example, so that order, repetition, batching, prefetching and
the saved position are grain's alone. Batches are dicts of numpy arrays: "inputs" (B, ...), "targets" (B, ...) and
"weights" (B,), float32, which is 0 on the rows that only fill up the last batch of an evaluation.
"""

import dataclasses
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.experiment import Data, Experiment

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


class DataError(RuntimeError):
    """Data that can't be read: the message is one line and names the file."""


class Examples(Protocol):
    """A data set: `example(index, rng)` with 0 <= index < len; `rng` draws the augmentation, None means none."""

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator | None) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples to learn from and those to be judged by."""

    train: Examples
    held_out: Examples


def load(experiment: Experiment) -> Splits:
    """The data set that the experiment names. Raises DataError where a file can't be read."""
    data, model = experiment.data, experiment.model
    if data.name == "digits":
        return digits()
    if data.name == "stdlib":
        assert isinstance(model, GPTConfig)
        return stdlib(data.root or sysconfig.get_path("stdlib"), model.context)
    held_out = max(1, data.examples // 8)
    return Splits(Synthetic(model, data.seed, 0, data.examples), Synthetic(model, data.seed, 1, held_out))


def train_batches(examples: Examples, data: Data, batch_size: int) -> grain.DatasetIterator:
    """Endless batches; each pass has its own order. The iterator's `get_state` and `set_state` save and restore the
    position."""

    def draw(index: int, rng: np.random.Generator) -> Example:
        return examples.example(index, rng if data.augment else None)

    batches = (
        grain.MapDataset.range(len(examples))
        .seed(data.seed)
        .shuffle()
        .repeat()
        .random_map(draw)
        .batch(batch_size)
        .map(_with_weights)
    )
    prefetch = 2 * data.threads
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=prefetch)))


def eval_batches(examples: Examples, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """One pass over the examples, or over `limit` of them, always the same ones. Every batch has `batch_size` rows."""
    order = grain.MapDataset.range(len(examples))
    if 0 < limit < len(examples):
        order = order.shuffle(seed=0)[:limit]
    batches = order.map(lambda index: examples.example(index, None)).batch(batch_size).map(_with_weights)
    return (_fill_up(batches[i], batch_size) for i in range(len(batches)))


def _with_weights(batch: Batch) -> Batch:
    return {**batch, "weights": np.ones(len(batch["targets"]), np.float32)}


def _fill_up(batch: Batch, batch_size: int) -> Batch:
    missing = batch_size - len(batch["weights"])
    return {key: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for key, x in batch.items()}


# --- scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels, ten classes


@dataclasses.dataclass(frozen=True)
class Digits:
    """images (N, 8, 8, 1), float32 from -1 (paper) to 1 (ink); labels (N,), int32.

    Augmentation: a shift of up to one pixel each way.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        image = self.images[index]
        if rng is not None:
            down, right = rng.integers(0, 3, size=2)
            framed = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=-1)
            image = framed[down : down + 8, right : right + 8]
        return {"inputs": image, "targets": self.labels[index]}


def digits(held_out_fraction: float = 0.2) -> Splits:
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


# --- the source of the Python standard library, as bytes

# Tests, demos and what other packages installed are not the library.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "_bundled", "__pycache__"}
)
HELD_OUT_SIXTEENTHS = 1  # of the files, by hash


@dataclasses.dataclass(frozen=True)
class Windows:
    """tokens (N,) uint8 or int32, cut into windows of `context` inputs and the targets one further.

    Augmentation: a window starts anywhere between its own start and the next one's.
    """

    tokens: np.ndarray
    context: int

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.context

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        start = index * self.context
        if rng is not None:
            start = min(start + int(rng.integers(self.context)), len(self.tokens) - self.context - 1)
        window = self.tokens[start : start + self.context + 1].astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}


def stdlib(root: str, context: int) -> Splits:
    """The .py files below `root`, in order of their path, joined by a zero byte (which no Python source contains).

    A file is held out if the hash of its relative path says so: adding a file moves no other file to the other side.
    Raises DataError, naming the file or folder, where it can't be read or where a side has less than one window.
    """
    base = pathlib.Path(root)
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in _python_files(base):
        name = path.relative_to(base).as_posix()
        try:
            texts[is_held_out(name)].append(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
    train, held_out = (Windows(_join(texts[side]), context) for side in (False, True))
    for side, windows in (("training", train), ("validation", held_out)):
        if len(windows) < 1:
            raise DataError(f"{root}: its .py files hold no {side} window of {context} + 1 bytes")
    return Splits(train, held_out)


def is_held_out(relative_path: str) -> bool:
    """Whether a file of the standard library is for validation; depends on its relative path alone."""
    return hashlib.sha256(relative_path.encode()).digest()[0] % 16 < HELD_OUT_SIXTEENTHS


def _python_files(base: pathlib.Path) -> list[pathlib.Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    found: list[pathlib.Path] = []
    for folder, folders, names in os.walk(base, onerror=refuse):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(base).as_posix())


def _join(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(texts), np.uint8)


# --- seeded noise, of the model's own shapes: for timing, there is nothing to learn in it


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """`examples` uniform images or token windows; each depends on (seed, split, index) alone, made when asked for."""

    model: ViTConfig | GPTConfig
    seed: int
    split: int
    examples: int

    def __len__(self) -> int:
        return self.examples

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        noise = np.random.default_rng((self.seed, self.split, index))
        model = self.model
        if isinstance(model, ViTConfig):
            shape = (model.image_size, model.image_size, model.channels)
            pixels = np.frombuffer(noise.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
            return {
                "inputs": pixels.astype(np.float32) / 127.5 - 1,
                "targets": np.asarray(noise.integers(model.classes), np.int32),
            }
        window = noise.integers(model.vocab_size, size=model.context + 1, dtype=np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}
