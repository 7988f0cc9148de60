"""What a data set is, and the grain pipelines that turn one into batches.

A data set is a length and a function (indices, draws) -> batch, so that order, repetition, batching, reading ahead and workers are grain's
alone, and a batch is cut out of memory by a few array operations. Batches are dicts of numpy arrays: "inputs" (B, ...), "targets"
(B, ...) and "weights" (B,), float32, which is 0 on the rows that only fill up the last batch of an evaluation.

The stream of batches is one, whoever reads it: what is random in a batch is drawn for the whole batch, a row an example, and each of
`process_count` processes reads its own rows of it. So the examples of step n depend on the seed and on n, and on nothing else: not on
the number of processes, of workers or of threads, nor on how often the run was interrupted.
"""

import dataclasses
import functools
import importlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from prenorm_jax.models.config import require
from prenorm_jax.training.experiment import Data, Experiment
from prenorm_jax.training.mixing import draw_mix

Batch = dict[str, np.ndarray]

MODULES = {
    "digits": "prenorm_jax.training.digits",
    "stdlib": "prenorm_jax.training.standard_library",
    "synthetic": "prenorm_jax.training.synthetic",
    "image_folder": "prenorm_jax.training.image_folder",
    "hugging_face": "prenorm_jax.training.hugging_face",
    "array_record": "prenorm_jax.training.array_records",
    "text": "prenorm_jax.training.text",
}
"""Where the data sets are: each module has a function load(data, model) -> Splits."""


class DataError(RuntimeError):
    """Data that can't be read: the message is one line and names the file."""


class Examples(Protocol):
    """A data set that can be pickled, for the worker processes."""

    def __len__(self) -> int: ...

    def draws(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """What the augmentation of `count` examples draws, (count, ...)."""
        ...

    def batch(self, indices: np.ndarray, draws: np.ndarray | None) -> Batch:
        """The examples of indices (B,), each from 0 to the length; draws (B, ...) as above, None for no augmentation."""
        ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples to learn from and those to be judged by."""

    train: Examples
    held_out: Examples


def load(experiment: Experiment) -> Splits:
    """The data set that the experiment names. Raises DataError where a file can't be read."""
    splits: Splits = importlib.import_module(MODULES[experiment.data.name]).load(experiment.data, experiment.model)
    return splits


@dataclasses.dataclass(frozen=True)
class Missing:
    """The training side of data that was given for evaluation only."""

    root: str

    def __len__(self) -> int:
        raise DataError(f"{self.root}: nothing to train on; expected train and val in it")

    def draws(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Never called."""
        raise DataError(f"{self.root}: nothing to train on")

    def batch(self, indices: np.ndarray, draws: np.ndarray | None) -> Batch:
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


class Batches(grain.DatasetIterator):
    """Endless batches of numbered steps; the position is the number of the next one.

    The state is that number, and not what grain's iterators say of themselves: so a run may go on with other workers and threads, on
    another number of processes, or with another version of grain.
    """

    def __init__(self, batches: grain.MapDataset, data: Data, examples: int) -> None:
        super().__init__()
        self._batches, self._data, self._examples = batches, data, examples
        self._next, self._running = 0, None  # type: int, grain.DatasetIterator | None

    def __next__(self) -> Batch:
        if self._running is None:
            self._running = iter(_read_ahead(self._batches[self._next :], self._data.threads, self._data.workers))
        try:
            batch: Batch = next(self._running)
        except DataError:
            raise
        except RuntimeError as error:  # grain's, of a worker that is gone
            text = str(error).partition("\n")[0]
            raise DataError(
                f"a process that reads ahead ended ({text}); perhaps memory: try fewer data.workers"
            ) from error
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """{"batches": how many were taken, "examples": the length of the data set}."""
        return {"batches": self._next, "examples": self._examples}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a state was taken. Raises: DataError where the data set had another length then."""
        if state.keys() != {"batches", "examples"}:
            raise DataError(f"the position in the data is not one of this version: it has {', '.join(state)}")
        if state["examples"] != self._examples:
            raise DataError(
                f"config.data: {self._examples} training examples, and {state['examples']} when the checkpoint was written; "
                "expected the same data (other data begins another --workdir)"
            )
        self.close()
        self._next = state["batches"]

    def close(self) -> None:
        """Ends worker processes and threads; the next batch starts new ones."""
        if self._running is not None:
            self._running.close()
        self._running = None


def train_batches(
    examples: Examples, data: Data, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Endless batches, each pass in its own order: of each batch of `batch_size` rows those that are this process's.

    Raises: ConfigError where the batch can't be split so.
    """
    rows = _rows(batch_size, process_index, process_count, "train.batch_size")
    distinct = -(-batch_size // data.repeats)
    mixed = data.augment and (data.mixup > 0 or data.cutmix > 0)
    pairs = not mixed or ((rows.stop - rows.start) % 2 == 0 and distinct > 1)
    require(
        pairs, "config.train.batch_size", batch_size, "an even number of rows in each process, to mix them in pairs"
    )
    make = functools.partial(_training_batch, examples, data, batch_size, rows, mixed)
    order = grain.MapDataset.range(len(examples)).seed(data.seed).shuffle().repeat()
    # The order has no end, so nothing is dropped; counted upwards, batches of one example would be more than an int of the machine holds.
    return Batches(order.batch(distinct, drop_remainder=True).random_map(make), data, len(examples))


def _training_batch(
    examples: Examples,
    data: Data,
    batch_size: int,
    rows: slice,
    mixed: bool,
    indices: np.ndarray,
    rng: np.random.Generator,
) -> Batch:
    # One repeat after the other: neighbours, which are what is mixed, are different examples. The last may be cut off.
    indices = np.tile(indices, data.repeats)[:batch_size]
    draws = examples.draws(rng, len(indices))[rows] if data.augment else None
    batch = _with_weights(examples.batch(indices[rows], draws))
    if mixed:
        batch["mix"] = np.repeat(draw_mix(rng, data.mixup, data.cutmix)[None], rows.stop - rows.start, axis=0)
    return batch


def eval_batches(
    examples: Examples,
    batch_size: int,
    limit: int = 0,
    data: Data | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over the examples, or over `limit` of them, always the same ones: this process's rows of batches of `batch_size` rows.

    Args:
      data: whose `threads` and `workers`, as so many threads, read ahead; None: nothing does.
    """
    rows = _rows(batch_size, process_index, process_count, "train.eval_batch_size")
    order = grain.MapDataset.range(len(examples))
    if 0 < limit < len(examples):
        order = order.shuffle(seed=0)[:limit]
    make = functools.partial(_evaluation_batch, examples, batch_size, rows)
    # Threads alone: starting processes takes longer than most evaluations.
    threads = data.threads * max(1, data.workers) if data else 0
    return iter(_read_ahead(order.batch(batch_size).map(make), threads, 0))


def _evaluation_batch(examples: Examples, batch_size: int, rows: slice, indices: np.ndarray) -> Batch:
    mine = indices[rows]
    # A process whose rows of the last batch are all missing still needs one of its shape.
    batch = _with_weights(examples.batch(mine if len(mine) else indices[:1], None))
    batch["weights"][len(mine) :] = 0
    missing = rows.stop - rows.start - len(batch["weights"])
    return {key: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for key, x in batch.items()}


def _rows(batch_size: int, process_index: int, process_count: int, field: str) -> slice:
    share, rest = divmod(batch_size, process_count)
    require(rest == 0, f"config.{field}", batch_size, f"a multiple of the number of processes, {process_count}")
    return slice(process_index * share, (process_index + 1) * share)


def _read_ahead(batches: grain.MapDataset, threads: int, workers: int) -> grain.IterDataset:
    # Of a worker a batch waits in each thread and one to be fetched; they are large where there are many.
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else 2 * threads)
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own, which are absl's, and a program without absl never parses them
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return batches.to_iter_dataset(reading).mp_prefetch(processes, worker_init_fn=_live_with_the_loop)


def _live_with_the_loop(worker: int, workers: int) -> None:
    """A worker's beginning: signals to the whole group are the loop's, which wants to finish its step, and no worker outlives the loop."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)

    def end_with_the_loop() -> None:
        loop = multiprocessing.parent_process()
        assert loop is not None
        loop.join()
        os._exit(1)

    threading.Thread(target=end_with_the_loop, daemon=True).start()


def _with_weights(batch: Batch) -> Batch:
    return {**batch, "weights": np.ones(len(batch["targets"]), np.float32)}
