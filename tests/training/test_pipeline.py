"""The stream of batches: one for any number of processes, workers and threads, and continued wherever it was left."""

import dataclasses
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import data
from prenorm_jax.training.experiment import Data

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Examples that say which they are and what the augmentation drew; where `broken` is among them, it can't be read."""

    count: int
    broken: int = -1

    def __len__(self) -> int:
        return self.count

    def draws(self, rng, count):
        return rng.integers(1 << 30, size=count)

    def batch(self, indices, draws):
        if self.broken in indices:
            raise data.DataError(f"cannot read picture {self.broken}")
        drawn = np.full(len(indices), -1) if draws is None else draws
        return {"inputs": np.stack([indices, drawn], axis=1), "targets": indices.astype(np.int32)}


def take(batches, count):
    return [next(batches) for _ in range(count)]


def joined(parts):
    """One batch of the rows of all processes."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], strict=True)


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(8, 40),
    rows=st.sampled_from([1, 2]),
    processes=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**32 - 1),
    repeats=st.sampled_from([1, 2, 3, 5]),
    mixup=st.sampled_from([0.0, 0.8]),
    cutmix=st.sampled_from([0.0, 1.0]),
    start=st.integers(0, 9),
)
def test_the_stream_is_the_same_for_any_number_of_processes(
    count, rows, processes, seed, repeats, mixup, cutmix, start
):
    settings = Data(seed=seed, threads=0, repeats=repeats, mixup=mixup, cutmix=cutmix)
    size = 24 * rows  # whatever the number of processes, a multiple of it, in pairs
    alone = data.train_batches(Numbered(count), settings, size)
    shares = [data.train_batches(Numbered(count), settings, size, index, processes) for index in range(processes)]
    for batches in (alone, *shares):
        batches.set_state({"batches": start, "examples": count})
    together = [joined(parts) for parts in zip(*(take(share, 2) for share in shares), strict=True)]
    assert_same(together, take(alone, 2))
    assert ("mix" in together[0]) == (mixup + cutmix > 0)


def test_processes_read_different_rows():
    """The negative control of the above: the shares are no copies of one another."""
    first, second = (next(data.train_batches(Numbered(40), Data(threads=0), 8, index, 2)) for index in (0, 1))
    assert not set(first["targets"]) & set(second["targets"])
    assert not set(first["inputs"][:, 1]) & set(second["inputs"][:, 1])


@pytest.mark.parametrize("processes", [2, 4])
def test_evaluations_are_shared_out_and_filled_up(processes):
    expected = list(data.eval_batches(Numbered(21), 8))
    shares = [list(data.eval_batches(Numbered(21), 8, 0, None, index, processes)) for index in range(processes)]
    together = [joined(parts) for parts in zip(*shares, strict=True)]
    for found, wanted in zip(together, expected, strict=True):
        real = wanted["weights"] == 1
        np.testing.assert_array_equal(found["weights"], wanted["weights"])
        np.testing.assert_array_equal(found["inputs"][real], wanted["inputs"][real])


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match=r"config.train.batch_size: got 8; allowed: a multiple of the number of proc"):
        data.train_batches(Numbered(40), Data(), 8, 0, 3)
    with pytest.raises(ConfigError, match=r"config.train.batch_size: got 6; allowed: an even number of rows in each"):
        data.train_batches(Numbered(40), Data(mixup=0.8), 6, 0, 2)


def test_repeated_examples_are_augmented_anew_and_never_neighbours():
    batch = next(data.train_batches(Numbered(40), Data(repeats=3), 14))
    indices, drawn = batch["inputs"].T
    assert sorted(np.unique(indices, return_counts=True)[1]) == [2, 3, 3, 3, 3]
    assert len(set(drawn)) == 14
    assert (indices[0::2] != indices[1::2]).all()


def test_one_blend_serves_a_batch_and_each_batch_has_its_own():
    first, second = take(data.train_batches(Numbered(40), Data(mixup=0.8, cutmix=1.0), 8), 2)
    assert first["mix"].shape == (8, 5)
    assert (first["mix"] == first["mix"][0]).all()
    assert (first["mix"][0] != second["mix"][0]).any()
    unmixed = next(data.train_batches(Numbered(40), Data(mixup=0.8, augment=False), 8))
    assert "mix" not in unmixed


def test_workers_change_nothing_and_may_change_between_stop_and_continuation():
    """Two processes read; then the stream goes on without any, and once more with one."""
    settings = Data(threads=1)
    whole = take(data.train_batches(Numbered(20), settings, 8), 9)
    batches = data.train_batches(Numbered(20), dataclasses.replace(settings, workers=2), 8)
    assert_same(take(batches, 5), whole[:5])
    position = batches.get_state()
    batches.close()
    for workers in (0, 1):
        resumed = data.train_batches(Numbered(20), dataclasses.replace(settings, workers=workers), 8)
        resumed.set_state(position)
        assert_same(take(resumed, 4), whole[5:])
        resumed.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_reader_cannot_read_is_said_by_the_loop_s_own_error(workers):
    batches = data.train_batches(Numbered(20, broken=7), Data(workers=workers), 10)
    with pytest.raises(data.DataError) as error:
        take(batches, 2)
    assert str(error.value) == "cannot read picture 7"
    batches.close()


PROGRAM = """
import multiprocessing, time
from prenorm_jax.models.config import GPTConfig
from prenorm_jax.training import data, synthetic
from prenorm_jax.training.experiment import Data
if __name__ == "__main__":
    model = GPTConfig(width=8, depth=1, heads=2, mlp_width=8, context=6, vocab_size=11)
    settings = Data(examples=64, workers=2)
    batches = data.train_batches(synthetic.load(settings, model).train, settings, 8)
    for _ in range(4):
        next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    while True:
        next(batches)
        time.sleep(0.05)
"""


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_workers_leave_signals_to_the_loop_and_end_with_it(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
    loop = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert loop.stdout is not None
    workers = [int(pid) for pid in loop.stdout.readline().split()]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    time.sleep(1)
    assert loop.poll() is None
    assert all(map(is_running, workers))
    loop.kill()
    loop.wait()
    loop.stdout.close()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker outlives its loop"
        time.sleep(0.1)


def test_a_worker_that_was_killed_is_one_line():
    batches = data.train_batches(Numbered(20), Data(workers=1), 10)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(data.DataError, match=r"a process that reads ahead ended \(.*exit code -9") as error:
        take(batches, 20)
    assert "\n" not in str(error.value)
    batches.close()


def test_other_data_than_the_checkpoint_s_is_refused():
    position = data.train_batches(Numbered(20), Data(), 8).get_state()
    with pytest.raises(data.DataError, match="21 training examples, and 20 when the checkpoint was written"):
        data.train_batches(Numbered(21), Data(), 8).set_state(position)
    with pytest.raises(data.DataError, match="not one of this version: it has next_index"):
        data.train_batches(Numbered(21), Data(), 8).set_state({"next_index": 3})


def test_a_data_set_s_module_is_there_for_every_name():
    from prenorm_jax.training.experiment import DATA_SETS

    assert data.MODULES.keys() == DATA_SETS.keys()
    folder = pathlib.Path(data.__file__).parent
    assert all((folder / f"{module.rpartition('.')[2]}.py").exists() for module in data.MODULES.values())
