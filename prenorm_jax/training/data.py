"""Data sets that need no download, and the grain pipelines that turn them into batches.

A data set is a length and a function (indices, rng) -> batch, so that order, repetition, batching, prefetching and the
saved position are grain's alone, and a batch is cut out of memory by a few array operations. Batches are dicts of numpy
arrays: "inputs" (B, ...), "targets" (B, ...) and "weights" (B,), float32, which is 0 on the rows that only fill up the
last batch of an evaluation.
"""

import dataclasses
import hashlib
import importlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.experiment import Data, Experiment

Batch = dict[str, np.ndarray]

FROM_FILES = {"image_folder": "prenorm_jax.training.image_folder", "text": "prenorm_jax.training.text"}
"""Data sets of the user's own files, in modules of their own."""


class DataError(RuntimeError):
    """Data that can't be read: the message is one line and names the file."""


class Examples(Protocol):
    """A data set. `batch` takes indices (B,) from 0 to its length; `rng` draws the augmentation, None means none."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None) -> Batch: ...


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
    if data.name in FROM_FILES:
        return importlib.import_module(FROM_FILES[data.name]).load(data, model)
    held_out = max(1, data.examples // 8)
    return Splits(Synthetic(model, data.seed, 0, data.examples), Synthetic(model, data.seed, 1, held_out))


@dataclasses.dataclass(frozen=True)
class Missing:
    """The training side of data that was given for evaluation only."""

    root: str

    def __len__(self) -> int:
        raise DataError(f"{self.root}: nothing to train on; expected a folder with train and val in it")

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None) -> Batch:
        """Never called."""
        raise DataError(f"{self.root}: nothing to train on")


def sides(root: str, what: str) -> tuple[pathlib.Path | None, pathlib.Path]:
    """Where the training and the held-out side of a data set are: root/train* and root/val*, or None and the root itself.

    Raises: DataError where there is nothing, or one side alone.
    """
    base = pathlib.Path(root)
    if not root or not base.exists():
        raise DataError(f"config.data.root: got {root!r}; expected {what}")
    found = {side: sorted(base.glob(f"{side}*")) for side in ("train", "val")} if base.is_dir() else {}
    several = [paths for paths in found.values() if len(paths) > 1]
    if several or sum(map(bool, found.values())) == 1:
        raise DataError(
            f"{root}: has {', '.join(path.name for paths in found.values() for path in paths)}; expected one train and one val"
        )
    return (found["train"][0], found["val"][0]) if any(found.values()) else (None, base)


def train_batches(examples: Examples, data: Data, batch_size: int) -> grain.DatasetIterator:
    """Endless batches; each pass has its own order. The iterator's `get_state` and `set_state` save and restore the
    position."""

    def draw(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        return _with_weights(examples.batch(indices, rng if data.augment else None))

    order = grain.MapDataset.range(len(examples)).seed(data.seed).shuffle().repeat()
    batches = order.batch(batch_size).random_map(draw)
    prefetch = 2 * data.threads
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=prefetch)))


def eval_batches(examples: Examples, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """One pass over the examples, or over `limit` of them, always the same ones. Every batch has `batch_size` rows."""
    order = grain.MapDataset.range(len(examples))
    if 0 < limit < len(examples):
        order = order.shuffle(seed=0)[:limit]
    batches = order.batch(batch_size)
    return (_fill_up(_with_weights(examples.batch(batches[i], None)), batch_size) for i in range(len(batches)))


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

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None) -> Batch:
        images = self.images[indices]
        if rng is not None:
            framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
            down, right = rng.integers(0, 3, size=(2, len(indices), 1)) + np.arange(8)
            images = framed[np.arange(len(indices))[:, None, None], down[:, :, None], right[:, None, :]]
        return {"inputs": images, "targets": self.labels[indices]}


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

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None) -> Batch:
        starts = indices * self.context
        if rng is not None:
            moved = starts + rng.integers(self.context, size=len(indices))
            starts = np.minimum(moved, len(self.tokens) - self.context - 1)
        windows = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)
        return {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


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

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None) -> Batch:
        size = int(np.prod(self.shape))

        def windows(starts: np.ndarray) -> np.ndarray:
            return np.stack([self.noise[start : start + size] for start in starts]).reshape(-1, *self.shape)

        targets = windows(indices + 1) if self.labels is None else self.labels[indices]
        return {"inputs": windows(indices), "targets": targets}
