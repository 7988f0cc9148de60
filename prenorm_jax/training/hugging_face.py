"""Pictures of a data set that the library `datasets` saved to disk (`save_to_disk`); texts of one become tokens by `prepare`."""

import dataclasses
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Missing, Splits
from prenorm_jax.training.experiment import Data
from prenorm_jax.training.pictures import opened, pictures

HELD_OUT = ("validation", "val", "test")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a split: a column of pictures, not decoded, and one of classes. A split is files that workers open for themselves."""

    table: Any
    root: str
    split: str
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """The split and the row."""
        return f"{self.root}, {self.split}, row {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture and its class. Raises: one of UNREADABLE."""
        row = self.table[index]
        said, label = row[self.image_key] or {}, row[self.label_key]
        encoded, path = said.get("bytes"), said.get("path")
        for key, missing in ((self.label_key, label is None), (self.image_key, encoded is None and path is None)):
            if missing:
                raise ValueError(f"nothing in the column {key}")
        return Image.open(str(path)) if encoded is None else opened(encoded), label


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """data.root: a saved data set with a training and a validation (or test) split, or one split, to evaluate. Raises: DataError."""
    splits = read_splits(data.root)
    held_out = next((name for name in HELD_OUT if name in splits), None)
    if held_out is None or ("train" not in splits and len(splits) > 1):
        raise DataError(f"{data.root}: has {', '.join(splits)}; expected train and one of {', '.join(HELD_OUT)}")
    train = pictures(_rows(splits, "train", data), data, model) if "train" in splits else Missing(data.root)
    return Splits(train, pictures(_rows(splits, held_out, data), data, model))


def read_splits(root: str) -> dict[str, Any]:
    """The splits of a saved data set, by name; one that was saved alone is "test". Raises: DataError, also where `datasets` is missing."""
    library = _library(root)
    if not pathlib.Path(root).is_dir():
        raise DataError(f"config.data.root: got {root!r}; expected a folder that datasets' save_to_disk wrote")
    try:
        found = library.load_from_disk(root)
    except Exception as error:  # its own, pyarrow's and the system's
        raise DataError(f"cannot read {root}: {str(error).splitlines()[0]}") from None
    return dict(found) if isinstance(found, library.DatasetDict) else {"test": found}


def read_texts(table: Any, key: str, root: str, field: str) -> Iterator[str]:
    """The texts of a split's column, which `field` names. Raises: DataError where there is no such column, or a row without a text."""
    _require_column(table, key, root, field, "texts", ("string", "large_string"))
    for index, row in enumerate(table.select_columns([key]).with_format(None)):
        if row[key] is None:
            raise DataError(f"{root}, row {index}: nothing in the column {key}; expected a text")
        yield row[key]


def _rows(splits: dict[str, Any], split: str, data: Data) -> Rows:
    table, image, label = splits[split], data.image_key, data.label_key
    for key, field, expected, dtypes in (
        (image, "config.data.image_key", "pictures (datasets.Image)", ("PIL",)),
        (label, "config.data.label_key", "whole numbers or classes (datasets.ClassLabel)", ("int", "uint")),
    ):
        _require_column(table, key, data.root, field, expected, dtypes)
    plain = table.select_columns([image, label]).cast_column(image, _library(data.root).Image(decode=False))
    return Rows(plain.with_format(None), data.root, split, image, label)


def _require_column(table: Any, key: str, root: str, field: str, expected: str, dtypes: tuple[str, ...]) -> None:
    """Raises DataError unless the split has the column that the field names, of a dtype that begins so."""
    if key not in table.column_names:
        raise DataError(f"{field}: got {key!r}; {root} has the columns {', '.join(table.column_names)}")
    library, feature = _library(root), table.features[key]
    one = isinstance(feature, library.Image | library.Value | library.ClassLabel)
    if not (one and feature.dtype.startswith(dtypes)):
        raise DataError(f"{root}: the column {key} is {feature}; expected {expected}, or another {field}")


def _library(root: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f'{root}: reading it needs the library datasets; pip install "prenorm-jax[data]" (or pip install datasets)'
        ) from None
