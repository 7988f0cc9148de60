"""Pictures in a folder a class, as ImageNet ships: root/train/n01440764/n01440764_18.JPEG, root/val/n01440764/...

Classes are the folders: by the checkpoint's own labels where their names are among them, by number where all names are numbers, and
otherwise in alphabetical order where there are as many as the model has classes, as ImageNet's are. Where there are two sides, the
training side's folders say what the classes are. Hidden files and folders, as systems and archivers leave them, don't count.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Examples, Missing, Splits, sides
from prenorm_jax.training.experiment import Data
from prenorm_jax.training.pictures import pictures, read_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Folders:
    """The pictures of `base`: their names (N,) as bytes, the folder of each (N,), and the class of each folder.

    A million paths are arrays and not objects, so that they cost 30 MB, and worker processes get them in no time.
    """

    base: pathlib.Path
    folders: tuple[str, ...]
    classes: tuple[int, ...]
    names: np.ndarray
    folder_of: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """The picture's path."""
        return os.path.join(self.base, self.folders[self.folder_of[index]], os.fsdecode(self.names[index]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture and its class."""
        return Image.open(self.where(index)), self.classes[self.folder_of[index]]


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """The pictures of data.root: folders of classes, or a train and a val folder of such. Raises: DataError."""
    assert isinstance(model, ViTConfig)
    train, held_out = sides(
        data.root, "a folder with a folder of pictures for each class, or with train and val of such"
    )
    names = _labels(pathlib.Path(data.processor)) if data.processor else {}
    numbers = class_numbers(_folders(train or held_out), names, model.classes, train or held_out)
    found: list[Examples] = [
        pictures(list_pictures(side, numbers), data, model) if side else Missing(data.root)
        for side in (train, held_out)
    ]
    return Splits(*found)


def list_pictures(base: pathlib.Path, numbers: Mapping[str, int]) -> Folders:
    """The pictures of base's folders, in order of their path. Raises: DataError for a folder that is empty or no class."""
    folders = _folders(base)
    names: list[bytes] = []
    counts = []
    for folder in folders:
        if folder not in numbers:
            raise DataError(f"{base / folder}: no such class among the training pictures; expected the same folders")
        # A scan of names, with no look at each file: ImageNet's 1.28 million take seconds.
        try:
            entries = [entry for entry in os.scandir(base / folder) if not entry.name.startswith(".")]
            within = next((entry.name for entry in entries if entry.is_dir()), None)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
        if within is not None:
            raise DataError(
                f"{base / folder / within}: a folder within a class; expected its pictures in {base / folder}"
            )
        found = sorted(os.fsencode(entry.name) for entry in entries if entry.name.lower().endswith(SUFFIXES))
        if not found:
            raise DataError(f"{base / folder}: no pictures in it; expected files with {', '.join(SUFFIXES)}")
        names += found
        counts.append(len(found))
    folder_of = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return Folders(base, tuple(folders), tuple(numbers[folder] for folder in folders), np.array(names), folder_of)


def _folders(base: pathlib.Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {base}: {error.strerror}") from error
    if not found:
        raise DataError(f"{base}: no folders in it; expected a folder of pictures for each class")
    return found


def class_numbers(folders: list[str], names: Mapping[str, int], classes: int, base: pathlib.Path) -> dict[str, int]:
    """Folder name -> class, as the module's docstring says. Raises: DataError where none of the three ways fits."""
    if folders and all(name in names for name in folders):
        return {name: names[name] for name in folders}
    if folders and all(name.isdecimal() and int(name) < classes for name in folders):
        numbers = {name: int(name) for name in folders}
        if len(set(numbers.values())) < len(numbers):
            twice = next(name for name in folders if sum(int(name) == other for other in numbers.values()) > 1)
            raise DataError(
                f"{base}: another folder is number {int(twice)}, as {twice} is; expected one folder for each class"
            )
        return numbers
    if len(folders) == classes:
        return {name: index for index, name in enumerate(sorted(folders))}
    raise DataError(
        f"{base}: {len(folders)} folders for a model of {classes} classes, and their names are neither its labels nor numbers; "
        "name them by number"
    )


def _labels(folder: pathlib.Path) -> dict[str, int]:
    """The checkpoint's own names of its classes."""
    if not (folder / "config.json").is_file():
        return {}
    said = read_json(folder / "config.json")
    names = said.get("id2label") or said.get("label_names") or {}
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {str(name): int(index) for index, name in pairs}
