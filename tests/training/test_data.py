"""Data: splits that never change, orders that a seed fixes, positions that can be saved, and errors that name the file."""

import dataclasses
import pathlib

import numpy as np
import pytest

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training import data, digits, standard_library
from prenorm_jax.training.experiment import Data, Experiment, default_experiment
from prenorm_jax.training.windows import Windows

VIT = ViTConfig(width=8, depth=1, heads=2, mlp_width=8, image_size=4, patch_size=2, channels=3, classes=5)
GPT = GPTConfig(width=8, depth=1, heads=2, mlp_width=8, context=6, vocab_size=11)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Examples that say which they are and what the augmentation drew."""

    count: int

    def __len__(self) -> int:
        return self.count

    def draws(self, rng, count):
        return rng.integers(1 << 30, size=count)

    def batch(self, indices, draws):
        drawn = np.full(len(indices), -1) if draws is None else draws
        return {"inputs": np.stack([indices, drawn], axis=1), "targets": indices.astype(np.int32)}


def one(examples, index: int, rng=None):
    """One example, without its batch axis."""
    draws = None if rng is None else examples.draws(rng, 1)
    return {key: x[0] for key, x in examples.batch(np.array([index]), draws).items()}


def take(batches, count: int):
    return [next(batches) for _ in range(count)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], strict=True)


def test_the_seed_fixes_order_and_augmentation():
    first, again, other = (take(data.train_batches(Numbered(20), Data(seed=seed), 8), 6) for seed in (3, 3, 4))
    assert_same(first, again)
    assert any((x["inputs"] != y["inputs"]).any() for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_change_nothing(threads):
    expected = take(data.train_batches(Numbered(20), Data(threads=1), 8), 6)
    assert_same(take(data.train_batches(Numbered(20), Data(threads=threads), 8), 6), expected)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_saved_position_continues_with_the_same_batches(stop):
    whole = data.train_batches(Numbered(20), Data(), 8)
    take(whole, stop)
    position, expected = whole.get_state(), take(whole, 5)
    resumed = data.train_batches(Numbered(20), Data(), 8)
    resumed.set_state(position)
    assert_same(take(resumed, 5), expected)


def test_every_pass_has_all_examples_in_its_own_order():
    seen = np.concatenate([batch["inputs"] for batch in take(data.train_batches(Numbered(24), Data(), 8), 6)])
    first, second = seen[:24], seen[24:]
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(24))
    assert (first[:, 0] != second[:, 0]).any()
    assert len(set(seen[:, 1])) == 48, "an example of two passes drew the same augmentation twice"


def test_a_batch_can_be_one_example():
    batches = data.train_batches(Numbered(5), Data(augment=False), 1)
    assert sorted(int(batch["targets"][0]) for batch in take(batches, 5)) == list(range(5))


def test_augmentation_can_be_left_out():
    (batch,) = take(data.train_batches(Numbered(8), Data(augment=False), 8), 1)
    assert (batch["inputs"][:, 1] == -1).all()
    assert batch["weights"].tolist() == [1.0] * 8


@pytest.mark.parametrize(("limit", "expected"), [(0, 21), (21, 21), (99, 21), (13, 13)])
def test_an_evaluation_sees_each_example_once_in_batches_of_one_size(limit, expected):
    batches = list(data.eval_batches(Numbered(21), 8, limit))
    assert all(batch["inputs"].shape == (8, 2) and batch["weights"].shape == (8,) for batch in batches)
    real = np.concatenate([batch["inputs"][batch["weights"] == 1] for batch in batches])
    assert len(set(real[:, 0])) == len(real) == expected
    assert (real[:, 1] == -1).all(), "an evaluation must not augment"
    assert sum(batch["weights"].sum() for batch in batches) == expected
    assert_same(list(data.eval_batches(Numbered(21), 8, limit)), batches)


def test_digits_are_split_by_class_and_never_otherwise():
    splits, again = (digits.load(Data(name="digits"), VIT) for _ in range(2))
    assert isinstance(splits.train, digits.Digits)
    assert isinstance(splits.held_out, digits.Digits)
    np.testing.assert_array_equal(splits.held_out.images, again.held_out.images)
    assert (len(splits.train), len(splits.held_out)) == (1438, 359)
    for part in (splits.train, splits.held_out):
        shares = np.bincount(part.labels) / len(part)
        assert part.images.shape == (len(part), 8, 8, 1)
        assert part.images.dtype == np.float32
        assert (part.images.min(), part.images.max()) == (-1, 1)
        np.testing.assert_allclose(shares, 0.1, atol=0.004)
    train = {image.tobytes() for image in splits.train.images}
    assert not train & {image.tobytes() for image in splits.held_out.images}


def test_a_digit_moves_by_at_most_a_pixel():
    part = digits.load(Data(name="digits"), VIT).train
    plain, rng = one(part, 7)["inputs"][..., 0], np.random.default_rng(0)
    framed = np.pad(plain, 1, constant_values=-1)
    allowed = {framed[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    drawn = {one(part, 7, rng)["inputs"][..., 0].tobytes() for _ in range(200)}
    assert drawn == allowed


def write_library(root: pathlib.Path) -> dict[str, str]:
    files = {f"{folder}module{i}.py": f"value_{i} = {i}\n" * 20 for i in range(40) for folder in ("", "package/")}
    left_out = {"test/a.py": "T" * 99, "package/tests/b.py": "T" * 99, "idlelib/c.py": "T" * 99, "notes.txt": "T" * 99}
    for name, text in {**files, **left_out}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return files


def test_stdlib_is_split_by_file(tmp_path):
    files = write_library(tmp_path)
    splits = standard_library.read(str(tmp_path), 32)
    assert isinstance(splits.train, Windows)
    assert isinstance(splits.held_out, Windows)
    for part, held_out in ((splits.train, False), (splits.held_out, True)):
        names = sorted(name for name in files if standard_library.is_held_out(name) == held_out)
        assert bytes(part.tokens).decode() == "\0".join(files[name] for name in names)
        assert 0 < len(part) == (len(part.tokens) - 1) // 32


def test_the_hash_of_a_path_is_what_it_always_was():
    held_out = [
        name
        for name in ("abc.py", "ast.py", "json/decoder.py", "typing.py", "uuid.py")
        if standard_library.is_held_out(name)
    ]
    share = np.mean([standard_library.is_held_out(f"folder/{i}.py") for i in range(4000)])
    assert held_out == ["uuid.py"]
    assert abs(share - 1 / 16) < 0.01


def test_windows_follow_each_other_and_targets_are_one_further():
    windows = Windows(np.arange(100, dtype=np.uint8), 8)
    examples = [one(windows, i) for i in range(len(windows))]
    np.testing.assert_array_equal(np.concatenate([e["inputs"] for e in examples]), np.arange(96))
    assert all((e["targets"] == e["inputs"] + 1).all() for e in examples)
    rng = np.random.default_rng(0)
    starts = {int(one(windows, 3, rng)["inputs"][0]) for _ in range(300)}
    assert starts == set(range(24, 32))
    assert max(int(one(windows, 11, rng)["targets"][-1]) for _ in range(100)) == 99


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write_library(tmp_path)
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere.py")
    with pytest.raises(data.DataError, match=r"cannot read .*broken\.py: No such file"):
        standard_library.read(str(tmp_path), 32)


def test_a_missing_folder_and_one_without_python_are_named(tmp_path):
    with pytest.raises(data.DataError, match=r"cannot read .*nowhere: No such file"):
        standard_library.read(str(tmp_path / "nowhere"), 32)
    with pytest.raises(data.DataError, match=r"hold no training window of 32 \+ 1 bytes"):
        standard_library.read(str(tmp_path), 32)


def test_this_interpreter_s_library_is_large_enough():
    splits = data.load(
        Experiment(task="language_modelling", model=dataclasses.replace(GPT, vocab_size=256), data=Data(name="stdlib"))
    )
    assert len(splits.train) * 6 > 5e6
    assert len(splits.held_out) * 6 > 1e5


@pytest.mark.parametrize("model", [VIT, GPT], ids=["vit", "gpt"])
def test_synthetic_examples_depend_on_seed_split_and_index_alone(model):
    experiment = default_experiment("image_classification" if model is VIT else "language_modelling")
    experiment = dataclasses.replace(experiment, model=model, data=Data(examples=64))
    splits = data.load(experiment)
    assert (len(splits.train), len(splits.held_out)) == (64, 8)
    first, same, other = (one(splits.train, i) for i in (5, 5, 6))
    np.testing.assert_array_equal(first["inputs"], same["inputs"], strict=True)
    assert (first["inputs"] != other["inputs"]).any()
    assert (first["inputs"] != one(splits.held_out, 5)["inputs"]).any()
    shape = (4, 4, 3) if model is VIT else (6,)
    assert first["inputs"].shape == shape
    assert np.asarray(first["targets"]).dtype == np.int32
    limit = model.classes if isinstance(model, ViTConfig) else model.vocab_size
    assert {int(t) for i in range(64) for t in np.ravel(one(splits.train, i)["targets"])} == set(range(limit))
