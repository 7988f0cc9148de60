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
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Missing, Splits
from prenorm_jax.training.experiment import Data
from prenorm_jax.training.pictures import opened, pictures

# As tensorflow/core/example/example.proto and feature.proto define it, in protobuf's own description of messages.
EXAMPLE = """
name: "example.proto" package: "prenorm_jax" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature"
  oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type_name: ".prenorm_jax.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL type_name: ".prenorm_jax.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type_name: ".prenorm_jax.Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: ".prenorm_jax.Features.FeatureEntry" }
  nested_type {
    name: "FeatureEntry"
    options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type_name: ".prenorm_jax.Feature" }
  }
}
message_type { name: "Example" field { name: "features" number: 1 label: LABEL_OPTIONAL type_name: ".prenorm_jax.Features" } }
""".replace("type_name", "type: TYPE_MESSAGE type_name")
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
    """The class of the message.

    >>> message = example_message()()
    >>> message.features.feature["label"].int64_list.value.append(7)
    >>> example_message().FromString(message.SerializeToString()).features.feature["label"].int64_list.value[0]
    7
    """
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("prenorm_jax.Example"))
