"""Random geometry and colours of pictures, as DeiT III trains with them (Touvron et al., 2022), by Pillow's own operations.

Each function takes a picture and a generator and returns a picture; what it draws depends on the generator alone.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

BICUBIC = Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a training picture goes through, in this order: crop, mirror, one of three, colours.

    Args:
      size: (height, width) of the result.
      crop: resized (`resized_crop`) or simple (`simple_crop`).
      least_area: of a resized crop, as a share of the picture.
      flip: whether it is mirrored half of the time.
      three: whether it is one of `THREE`.
      jitter: of `colour_jitter`; 0 for none.
    """

    size: tuple[int, int]
    crop: str = "resized"
    least_area: float = 0.08
    flip: bool = True
    three: bool = False
    jitter: float = 0.0

    def __call__(self, image: Image.Image, mode: str, rng: np.random.Generator) -> np.ndarray:
        """A picture just opened -> (height, width) or (height, width, 3) uint8 of `mode` L or RGB."""
        if self.crop == "resized":
            image = resized_crop(image, mode, self.size, rng, self.least_area)
        else:
            image = simple_crop(image.convert(mode), self.size, rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.three:
            image = THREE[rng.integers(len(THREE))](image, rng)
        if self.jitter:
            image = colour_jitter(image, rng, self.jitter)
        return np.asarray(image)


def resized_crop(
    image: Image.Image, mode: str, size: tuple[int, int], rng: np.random.Generator, least_area: float
) -> Image.Image:
    """A part of least_area to all of the picture, between 3:4 and 4:3, resized (Szegedy et al., 2015); the largest such part around the
    centre where ten draws don't fit."""
    left, top, width, height = _box(*image.size, rng, least_area)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time: as small as still has all the pixels asked for.
    whole = image.size
    shrink = max(size[1] / width, size[0] / height)
    if shrink < 1:
        image.draft(None, (math.ceil(whole[0] * shrink), math.ceil(whole[1] * shrink)))
    across, down = image.size[0] / whole[0], image.size[1] / whole[1]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.convert(mode).resize(size[::-1], BICUBIC, box=box)


def _box(width: int, height: int, rng: np.random.Generator, least_area: float) -> tuple[int, int, int, int]:
    """(left, top, width, height)"""
    for _ in range(10):
        area = rng.uniform(least_area, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = rng.integers(width - across + 1), rng.integers(height - down + 1)
            return int(left), int(top), across, down
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - across) // 2, (height - down) // 2, across, down


def simple_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator, margin: int = 4) -> Image.Image:
    """DeiT III's simple random crop: resized until it covers `size`, reflected `margin` pixels beyond its edges, and cut anywhere."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), BICUBIC)
    pixels = np.asarray(image)
    framed = np.pad(pixels, [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="reflect")
    top, left = (int(rng.integers(framed.shape[axis] - size[axis] + 1)) for axis in (0, 1))
    return Image.fromarray(np.ascontiguousarray(framed[top : top + height, left : left + width]))


def grey(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Without colours, in the picture's own mode."""
    return ImageOps.grayscale(image).convert(image.mode)


def solarize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The brighter half of all values inverted."""
    return ImageOps.solarize(image)


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian, of a radius of 0.1 to 2 pixels."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))


THREE = (grey, solarize, blur)
"""DeiT III's 3-Augment: one of them, each as likely."""


def colour_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Brightness, contrast and saturation times 1 - strength to 1 + strength each, in a random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=len(enhancers))
    for index in rng.permutation(len(enhancers)):
        image = enhancers[index](image).enhance(float(factors[index]))
    return image
