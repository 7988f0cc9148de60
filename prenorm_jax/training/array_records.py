"""Pictures in ArrayRecord files, as TensorFlow Datasets writes them (`file_format="array_record"`): neither it nor TensorFlow is needed.

A record is a tf.train.Example: a map of names to lists of bytes, floats or integers, of which two are read, the encoded picture and
the class. The message is described here, field by field, so that protobuf reads it.
"""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import grain
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Missing, Splits
from prenorm_jax.training.experiment import Data
from prenorm_jax.training.pictures import opened, pictures

SPLITS = {"train": ("train",), "held out": ("validation", "val", "test")}


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split's files, in order of their names. Readers are opened by each process for itself."""

    files: tuple[str, ...]
    source: Any
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        """The first file and the record's number over all of them."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"record {index} of {self.files[0]}{more}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture and its class."""
        try:
            features = example_message().FromString(self.source[index]).features.feature
        except (DecodeError, RuntimeError) as error:
            raise ValueError(f"no tf.train.Example: {error}") from error
        for key in (self.image_key, self.label_key):
            if key not in features:
                raise ValueError(
                    f"it has no {key}, but {', '.join(sorted(features))} (config.data.image_key, label_key)"
                )
        picture, label = features[self.image_key].bytes_list.value, features[self.label_key].int64_list.value
        if len(picture) != 1 or len(label) != 1:
            raise ValueError(f"{self.image_key} and {self.label_key} hold no picture and class")
        return opened(picture[0]), label[0]


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """The files of the folder data.root that have train, and those that have validation, val or test in their names. Raises: DataError."""
    root = pathlib.Path(data.root)
    if not data.root or not root.is_dir():
        raise DataError(f"config.data.root: got {data.root!r}; expected a folder of .array_record files")
    train, held_out = (_files(root, words) for words in SPLITS.values())
    if not held_out:
        raise DataError(
            f"{root}: no .array_record files with validation, val or test in their names; expected some beside those with train"
        )
    judged = pictures(_records(held_out, data), data, model)
    return Splits(pictures(_records(train, data), data, model) if train else Missing(data.root), judged)


def _files(root: pathlib.Path, words: tuple[str, ...]) -> tuple[str, ...]:
    """The files of the first of `words` that there are any of."""
    files = sorted(str(path) for path in root.iterdir() if re.search(r"\.array_?record", path.name))
    of_word = ([file for file in files if re.search(rf"\b{word}\b", pathlib.Path(file).name)] for word in words)
    return tuple(next(filter(None, of_word), ()))


def _records(files: tuple[str, ...], data: Data) -> Records:
    for file in files:
        _require_whole(file)
    return Records(files, grain.sources.ArrayRecordDataSource(list(files)), data.image_key, data.label_key)


def _require_whole(file: str) -> None:
    try:
        grain.sources.ArrayRecordDataSource(file)
    except Exception as error:  # of a library in C++, whose errors are of any kind
        raise DataError(f"cannot read {file}: {str(error).splitlines()[0]}") from None


@functools.cache
def example_message() -> Any:
    """The class of the message tf.train.Example (tensorflow/core/example/example.proto and feature.proto).

    >>> message = example_message()()
    >>> message.features.feature["label"].int64_list.value.append(7)
    >>> example_message().FromString(message.SerializeToString()).features.feature["label"].int64_list.value[0]
    7
    """
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="prenorm_jax.example", syntax="proto3")

    def message(within: Any, name: str, *fields: tuple[str, int, int, str], repeated: tuple[str, ...] = ()) -> Any:
        made = within.add(name=name)
        for field, number, kind, type_name in fields:
            label = kinds.LABEL_REPEATED if field in repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, type_name=type_name, label=label)
        return made

    here, value = ".prenorm_jax.example", ("value",)
    message(file.message_type, "BytesList", ("value", 1, kinds.TYPE_BYTES, ""), repeated=value)
    message(file.message_type, "FloatList", ("value", 1, kinds.TYPE_FLOAT, ""), repeated=value)
    message(file.message_type, "Int64List", ("value", 1, kinds.TYPE_INT64, ""), repeated=value)
    feature = message(
        file.message_type,
        "Feature",
        ("bytes_list", 1, kinds.TYPE_MESSAGE, f"{here}.BytesList"),
        ("float_list", 2, kinds.TYPE_MESSAGE, f"{here}.FloatList"),
        ("int64_list", 3, kinds.TYPE_MESSAGE, f"{here}.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    entry = f"{here}.Features.FeatureEntry"
    features = message(file.message_type, "Features", ("feature", 1, kinds.TYPE_MESSAGE, entry), repeated=("feature",))
    pair = message(
        features.nested_type,
        "FeatureEntry",
        ("key", 1, kinds.TYPE_STRING, ""),
        ("value", 2, kinds.TYPE_MESSAGE, f"{here}.Feature"),
    )
    pair.options.map_entry = True
    message(file.message_type, "Example", ("features", 1, kinds.TYPE_MESSAGE, f"{here}.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("prenorm_jax.example.Example"))
