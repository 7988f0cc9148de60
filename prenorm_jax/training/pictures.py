"""Pictures as examples: read from a source, cut and resized on the host, as uint8; on the device they become what the model takes."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.augment import Augmentation
from prenorm_jax.training.data import Batch, DataError
from prenorm_jax.training.experiment import Data

# What Pillow raises for files that it can't read.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# Of a picture once it is resized: Pillow's own bound for one that is read.
MOST_PIXELS = 89_478_485


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What a model takes for values of 0 to 255: (value * factor - mean) / std, mean and std one a channel, or one for all."""

    factor: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


AS_THEY_ARE = Pixels()
# Mean and standard deviation of ImageNet's pixels, as everybody trains with them; for grey pictures their means.
IMAGENET = {
    3: Pixels(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: Pixels(1 / 255, (0.449,), (0.226,)),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre; None leaves a step out.

    Args:
      size: (height, width) to resize to, or the length of the shorter edge.
      resample: PIL's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.
      crop: (height, width) of the centre.
    """

    size: tuple[int, int] | int | None = None
    resample: int = 3
    crop: tuple[int, int] | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(height, width) or (height, width, channels) uint8."""
        if self.size is not None:
            image = image.resize(self._resized(image), Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """(width, height)"""
        if not isinstance(self.size, int):
            assert self.size is not None
            return self.size[1], self.size[0]
        shorter = min(image.size)
        width, height = (self.size if edge == shorter else int(self.size * edge / shorter) for edge in image.size)
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels, which with the shorter edge resized to {self.size} are {width} x {height}; "
                f"at most {MOST_PIXELS:,} in all"
            )
        return width, height


class Source(Protocol):
    """Where pictures come from; it can be pickled."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture, opened and not yet decoded, and its class. Raises: one of UNREADABLE."""
        ...

    def where(self, index: int) -> str:
        """What messages call it."""
        ...


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of a source, read when they are asked for.

    Args:
      preprocessing: of an evaluation, and of training without a random crop.
      augmentation: of training; None: mirrored half of the time.
      shape: (height, width, channels) of the model.
    """

    source: Source
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    shape: tuple[int, int, int]
    classes: int

    def __len__(self) -> int:
        return len(self.source)

    def draws(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """A seed for each, (count,)."""
        return rng.integers(2**63, size=count)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None) -> Batch:
        """Images (B, height, width, channels) uint8 and labels (B,) int32. Raises: DataError, naming what can't be read."""
        seeds = [None] * len(indices) if draws is None else draws
        images, labels = zip(*map(self._example, indices, seeds), strict=True)
        return {"inputs": np.stack(images), "targets": np.asarray(labels, np.int32)}

    def _example(self, index: int, seed: int | None) -> tuple[np.ndarray, int]:
        try:
            image, label = self.source.read(int(index))
            with image:
                pixels = self._pixels(image, seed)
        except UNREADABLE as error:
            raise DataError(f"cannot read {self.source.where(index)}: {error}") from error
        if pixels.shape != self.shape:
            raise DataError(
                f"{self.source.where(index)}: {pixels.shape} as config.data prepares it; the model takes {self.shape}"
            )
        if not 0 <= label < self.classes:
            raise DataError(
                f"{self.source.where(index)}: class {label}; expected 0 to {self.classes - 1}, of config.model.classes"
            )
        return pixels, label

    def _pixels(self, image: Image.Image, seed: int | None) -> np.ndarray:
        mode = "RGB" if self.shape[2] == 3 else "L"
        if image.mode.startswith("I;16"):  # Pillow would cut values off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("F", "I"):  # Pillow would cut them off as well, and what is white in them nobody says
            raise ValueError(f"its pixels are {image.mode!r}, numbers without a range; expected 8 or 16 bits a channel")
        rng = None if seed is None else np.random.Generator(np.random.PCG64(seed))
        if rng is not None and self.augmentation is not None:
            pixels = self.augmentation(image, mode, rng)
        else:
            pixels = self.preprocessing(image.convert(mode))
            pixels = pixels[:, ::-1] if rng is not None and rng.random() < 0.5 else pixels
        return pixels[..., None] if pixels.ndim == 2 else pixels


def pictures(source: Source, data: Data, model: ViTConfig | GPTConfig) -> Pictures:
    """The examples that data.* and the model ask for. Raises: DataError for a preprocessor_config.json that is not understood."""
    assert isinstance(model, ViTConfig)
    size, shape = (model.image_size, model.image_size), (model.image_size, model.image_size, model.channels)
    augmentation = None
    if data.crop != "centre":
        augmentation = Augmentation(size, data.crop, data.least_area, data.flip, data.three_augment, data.colour_jitter)
    if data.processor:
        preprocessing, _ = read_preprocessing(pathlib.Path(data.processor))
    else:
        preprocessing = Preprocessing(round(model.image_size / data.eval_crop), 3, size)
    return Pictures(source, preprocessing, augmentation, shape, model.classes)


def pixels_of(data: Data, channels: int) -> Pixels:
    """What the model takes for pixel values: as the checkpoint's preprocessor_config.json says, or as ImageNet is trained with."""
    return (
        read_preprocessing(pathlib.Path(data.processor))[1] if data.processor else IMAGENET.get(channels, AS_THEY_ARE)
    )


def opened(encoded: bytes) -> Image.Image:
    """A picture from the bytes of its file. Raises: one of UNREADABLE."""
    return Image.open(io.BytesIO(encoded))


def read_preprocessing(folder: pathlib.Path) -> tuple[Preprocessing, Pixels]:
    """What preprocessor_config.json says. Raises: DataError where there is none, or one that is not understood."""
    said = read_json(folder / "preprocessor_config.json")
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
        preprocessing = Preprocessing(
            size=size if said.get("do_resize", True) else None,
            resample=said.get("resample", 2),
            crop=crop if said.get("do_center_crop", False) else None,
        )
        pixels = Pixels(
            factor=said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0,
            mean=tuple(said["image_mean"]) if normalised else (0.0,),
            std=tuple(said["image_std"]) if normalised else (1.0,),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'preprocessor_config.json'}: not understood ({error!r})") from None
    return preprocessing, pixels


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object of a checkpoint's file. Raises: DataError."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {file}: {error}; config.data.processor is the folder of the checkpoint's own"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected a JSON object")
    return found
