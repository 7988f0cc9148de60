"""Pictures of a data set that the library `datasets` saved to disk (`save_to_disk`); texts of one become tokens by `prepare`."""

import dataclasses
import importlib
import pathlib
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
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """The split and the row."""
        return f"{self.root}, {self.table.split}, row {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture and its class."""
        row = self.table[index]
        said = row[self.image_key]
        picture = Image.open(said["path"]) if said["bytes"] is None else opened(said["bytes"])
        return picture, int(row[self.label_key])


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """data.root: a saved data set with a training and a validation (or test) split, or one split, to evaluate. Raises: DataError."""
    splits = read_splits(data.root)
    held_out = next((splits[name] for name in HELD_OUT if name in splits), None)
    if held_out is None or ("train" not in splits and len(splits) > 1):
        raise DataError(f"{data.root}: has {', '.join(splits)}; expected train and one of {', '.join(HELD_OUT)}")
    sources = [_rows(splits[name], data) if name in splits else None for name in ("train",)] + [_rows(held_out, data)]
    train, judged = (Missing(data.root) if rows is None else pictures(rows, data, model) for rows in sources)
    return Splits(train, judged)


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


def require_column(table: Any, key: str, root: str, field: str) -> None:
    """Raises DataError unless the split has the column that the field names."""
    if key not in table.column_names:
        raise DataError(f"{field}: got {key!r}; {root} has the columns {', '.join(table.column_names)}")


def _rows(table: Any, data: Data) -> Rows:
    image = _library(data.root).Image
    for field, key in (("image_key", data.image_key), ("label_key", data.label_key)):
        require_column(table, key, data.root, f"config.data.{field}")
    if not isinstance(table.features[data.image_key], image):
        raise DataError(
            f"{data.root}: the column {data.image_key} is {table.features[data.image_key]}; expected pictures (datasets.Image)"
        )
    plain = table.select_columns([data.image_key, data.label_key]).cast_column(data.image_key, image(decode=False))
    return Rows(plain.with_format(None), data.root, data.image_key, data.label_key)


def _library(root: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f'{root}: reading it needs the library datasets; pip install "prenorm-jax[data]" (or pip install datasets)'
        ) from None
