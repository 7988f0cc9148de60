"""How a checkpoint's images are prepared, in the words of transformers' preprocessor_config.json, whoever wrote the checkpoint."""

import pathlib
from collections.abc import Mapping
from typing import Any

from prenorm_jax.interop import safetensors
from prenorm_jax.interop.families import Family

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


def preprocessing(
    folder: pathlib.Path, config: Mapping[str, Any], family: Family, image_size: int
) -> dict[str, Any] | None:
    """What a checkpoint's folder says, for images of this size, or None where it says nothing.

    Args:
      config: config.json; timm's holds a pretrained_cfg.
      image_size: where it is not the checkpoint's own, sizes and crop are scaled along.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        said = safetensors.json_object(file.read_bytes(), file)
    elif isinstance(config.get("pretrained_cfg"), Mapping):
        said = of_timm(config["pretrained_cfg"], image_size)
    elif family.value_range:
        said = value_range(image_size)
    else:
        return None
    return _scaled(said, image_size)


def value_range(size: int) -> dict[str, Any]:
    """Images resized, and mapped to -1..1."""
    return {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": FILTERS["bilinear"],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def of_timm(said: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """timm's evaluation: the shorter edge to size / crop_pct, then the centre."""
    size = said.get("input_size", [3, image_size, image_size])[-1]
    return {
        **value_range(size),
        "size": {"shortest_edge": int(size / said.get("crop_pct", 0.875))},
        "resample": FILTERS.get(said.get("interpolation", "bicubic"), FILTERS["bicubic"]),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": list(said.get("mean", [0.485, 0.456, 0.406])),
        "image_std": list(said.get("std", [0.229, 0.224, 0.225])),
    }


def _scaled(said: dict[str, Any], image_size: int) -> dict[str, Any]:
    cropped = said.get("do_center_crop", False) and "crop_size" in said
    edge = _edge(said["crop_size"] if cropped else said.get("size"))
    if edge in (None, image_size):
        return said
    found = {**said, "crop_size" if cropped else "size": {"height": image_size, "width": image_size}}
    before = _edge(said.get("size"))
    if cropped and before:
        scaled = before * image_size // edge
        shorter = not isinstance(said["size"], Mapping) or "shortest_edge" in said["size"]
        found["size"] = {"shortest_edge": scaled} if shorter else {"height": scaled, "width": scaled}
    return found


def _edge(size: Any) -> int | None:
    """A square's side, or the shorter edge; None for what is neither."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height") if size.get("height") == size.get("width") else None)
    return size if isinstance(size, int) else None
