"""Pictures in a folder a class, prepared as the checkpoint's preprocessor_config.json says.

Classes are the folders: by the checkpoint's own labels where their names are among them, by number where all names are numbers, and
otherwise in alphabetical order where there are as many as the model has classes, as ImageNet's are.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import Batch, DataError, Missing, Splits, sides
from prenorm_jax.training.experiment import Data

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, rescale, normalise; None and 1 leave a step out.

    Args:
      size: (height, width) to resize to, or the length of the shorter edge.
      resample: PIL's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.
      crop: (height, width) of the centre.
    """

    size: tuple[int, int] | int | None = None
    resample: int = 3
    crop: tuple[int, int] | None = None
    factor: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(height, width, channels) float32."""
        if self.size is not None:
            image = image.resize(self._resized(image), Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return (pixels * np.float32(self.factor) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """(width, height)"""
        if not isinstance(self.size, int):
            assert self.size is not None
            return self.size[1], self.size[0]
        shorter = min(image.size)
        return tuple(self.size if edge == shorter else int(self.size * edge / shorter) for edge in image.size)  # type: ignore[return-value]


def read_preprocessing(folder: pathlib.Path) -> Preprocessing:
    """What preprocessor_config.json says. Raises: DataError where there is none, or one that is not understood."""
    said = _json(folder / "preprocessor_config.json")
    try:
        size = said.get("size")
        if isinstance(size, Mapping):
            size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        elif size is not None:  # the older form: a square, or with a crop the shorter edge
            size = size if said.get("do_center_crop") else (size, size)
        crop = said.get("crop_size", (0, 0))
        crop = (
            (crop["height"], crop["width"])
            if isinstance(crop, Mapping)
            else (crop, crop)
            if isinstance(crop, int)
            else crop
        )
        normalised = said.get("do_normalize", True)
        return Preprocessing(
            size=size if said.get("do_resize", True) else None,
            resample=said.get("resample", 2),
            crop=crop if said.get("do_center_crop", False) else None,
            factor=said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0,
            mean=tuple(said["image_mean"]) if normalised else (0.0,),
            std=tuple(said["image_std"]) if normalised else (1.0,),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'preprocessor_config.json'}: not understood ({error!r})") from None


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Files with their classes, read when they are asked for; augmentation: mirrored half of the time."""

    files: tuple[pathlib.Path, ...]
    labels: np.ndarray
    prepare: Preprocessing
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None) -> Batch:
        """Images (B, height, width, channels) and labels (B,). Raises: DataError, naming the file, for one that can't be read."""
        images = np.stack([self._read(self.files[index]) for index in indices])
        if rng is not None:
            mirrored = rng.random(len(indices)) < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return {"inputs": images, "targets": self.labels[indices]}

    def _read(self, file: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                pixels = self.prepare(image.convert("RGB" if self.shape[2] == 3 else "L"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {file}: {error}") from error
        if pixels.shape != self.shape:
            raise DataError(
                f"{file}: {pixels.shape} as preprocessor_config.json prepares it; the model takes {self.shape}"
            )
        return pixels


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """The pictures of data.root: folders of classes, or a train and a val folder of such. Raises: DataError."""
    assert isinstance(model, ViTConfig)
    train, held_out = sides(
        data.root, "a folder with a folder of pictures for each class, or with train and val of such"
    )
    processor = pathlib.Path(data.processor)
    prepare, names = read_preprocessing(processor), _labels(processor)
    shape = (model.image_size, model.image_size, model.channels)
    found = [
        _folder(path, names, model.classes, prepare, shape) if path else Missing(data.root)
        for path in (train, held_out)
    ]
    return Splits(*found)


def _folder(
    base: pathlib.Path, names: Mapping[str, int], classes: int, prepare: Preprocessing, shape: tuple[int, int, int]
) -> ImageFolder:
    folders = sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    numbers = class_numbers([folder.name for folder in folders], names, classes, base)
    pairs = [
        (file, numbers[folder.name])
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not pairs:
        raise DataError(
            f"{base}: no pictures in its folders; expected a folder for each class, with {', '.join(sorted(SUFFIXES))}"
        )
    files, labels = zip(*pairs, strict=True)
    return ImageFolder(files, np.asarray(labels, np.int32), prepare, shape)


def class_numbers(folders: list[str], names: Mapping[str, int], classes: int, base: pathlib.Path) -> dict[str, int]:
    """Folder name -> class, as the module's docstring says. Raises: DataError where none of the three ways fits."""
    if folders and all(name in names for name in folders):
        return {name: names[name] for name in folders}
    if folders and all(name.isdecimal() and int(name) < classes for name in folders):
        return {name: int(name) for name in folders}
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
    said = _json(folder / "config.json")
    names = said.get("id2label") or said.get("label_names") or {}
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {str(name): int(index) for index, name in pairs}


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {file}: {error}; config.data.processor is the folder of the checkpoint's own"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected a JSON object")
    return found
