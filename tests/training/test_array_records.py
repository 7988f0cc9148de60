"""Pictures in ArrayRecord files of tf.train.Example records, as TensorFlow Datasets writes them."""

import pathlib

import numpy as np
import pictures_on_disk as disk
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from prenorm_jax.models.config import ViTConfig
from prenorm_jax.training import data
from prenorm_jax.training.array_records import example_message
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Data, Experiment

VIT = ViTConfig(width=8, depth=1, heads=2, mlp_width=8, image_size=16, patch_size=8, channels=3, classes=3)
# tf.train.Example of {"label": [7]}, byte by byte as protobuf's encoding has it.
LABEL_7 = bytes([0x0A, 0x10, 0x0A, 0x0E, 0x0A, 0x05]) + b"label" + bytes([0x12, 0x05, 0x1A, 0x03, 0x0A, 0x01, 0x07])


def record(seed: int, label: int, **further: bytes) -> bytes:
    message = example_message()()
    message.features.feature["image"].bytes_list.value.append(disk.jpeg(seed))
    message.features.feature["label"].int64_list.value.append(label)
    for name, value in further.items():
        message.features.feature[name].bytes_list.value.append(value)
    return message.SerializeToString()


def write(path: pathlib.Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for one in records:
        writer.write(one)
    writer.close()


def write_set(root: pathlib.Path) -> pathlib.Path:
    root.mkdir()
    for shard in range(2):
        pictures = [record(10 * shard + i, (shard + i) % 3, file_name=b"x") for i in range(4)]
        write(root / f"small-train.array_record-0000{shard}-of-00002", pictures)
    write(root / "small-validation.array_record-00000-of-00001", [record(50 + i, i) for i in range(3)])
    write(root / "small-test.array_record-00000-of-00001", [record(60, 0)])
    (root / "features.json").write_text("{}")
    return root


def load(root: pathlib.Path, **fields):
    settings = Data(name="array_record", root=str(root), threads=1, **fields)
    return data.load(Experiment(task="image_classification", model=VIT, data=settings))


def test_the_message_is_the_one_that_tensorflow_writes():
    read = example_message().FromString(LABEL_7)
    assert list(read.features.feature["label"].int64_list.value) == [7]
    assert read.SerializeToString() == LABEL_7


def test_records_of_all_files_are_pictures_with_classes(tmp_path):
    splits = load(write_set(tmp_path / "small"))
    assert (len(splits.train), len(splits.held_out)) == (8, 3)
    batch = splits.train.batch(np.arange(8), None)
    assert batch["targets"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert splits.held_out.batch(np.arange(3), None)["targets"].tolist() == [0, 1, 2]
    assert batch["inputs"].shape == (8, 16, 16, 3)


def test_a_worker_process_reads_them(tmp_path):
    train = load(write_set(tmp_path / "small")).train
    plain, worker = (
        data.train_batches(train, Data(crop="resized", threads=1, workers=workers), 4) for workers in (0, 1)
    )
    np.testing.assert_array_equal(next(worker)["inputs"], next(plain)["inputs"])
    worker.close()


def test_faults_name_the_file(tmp_path):
    root = write_set(tmp_path / "small")
    with pytest.raises(DataError, match=r"record 0 of .*small-train.*00000-of-00002 and 1 more: it has no img, but"):
        load(root, image_key="img").train.batch(np.array([0]), None)
    write(root / "small-validation.array_record-00000-of-00001", [record(1, 3), b"\xff\xff"])
    held_out = load(root).held_out
    with pytest.raises(DataError, match=r"record 0 of .*validation.*: class 3; expected 0 to 2"):
        held_out.batch(np.array([0]), None)
    with pytest.raises(DataError, match=r"cannot read record 1 of .*validation.*: no tf.train.Example"):
        held_out.batch(np.array([1]), None)
    cut_off = root / "small-train.array_record-00001-of-00002"
    cut_off.write_bytes(cut_off.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read .*small-train.array_record-00001-of-00002: "):
        load(root)
    with pytest.raises(DataError, match=r"config.data.root: got ''"):
        data.load(Experiment(task="image_classification", model=VIT, data=Data(name="array_record")))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: no .array_record files with validation, val or test"):
        load(tmp_path / "none")
