"""Small pictures in a folder a class, as ImageNet ships."""

import io
import pathlib

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02", "n03")


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth noise, as photographs are: it survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tree(root: pathlib.Path, train: int = 4, val: int = 2) -> pathlib.Path:
    """root/train/n01/n01_0.JPEG and so on; returns the root."""
    for side, count in (("train", train), ("val", val)):
        for number, name in enumerate(CLASSES):
            folder = root / side / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{name}_{index}.JPEG").write_bytes(jpeg(1000 * (side == "val") + 100 * number + index))
    return root
