"""A text, or its token ids, cut into windows of a GPT's context.

A text is read with the tokenizer.json of the checkpoint (the library `tokenizers`); token ids are a .npy file of integers, or a .bin
file of unsigned 16-bit ones, as nanoGPT writes them.
"""

import importlib
import pathlib
from typing import Any

import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Missing, Splits, Windows, sides
from prenorm_jax.training.experiment import Data


def load(data: Data, model: GPTConfig | ViTConfig) -> Splits:
    """The windows of data.root: a file, or a folder with train and val files.

    Raises: DataError where a file can't be read, is shorter than a window, or holds ids that the model has no row for.
    """
    assert isinstance(model, GPTConfig)
    train, held_out = sides(data.root, "a text, a .npy or .bin of token ids, or a folder with train and val files")
    windows = [_windows(path, data, model) if path else Missing(data.root) for path in (train, held_out)]
    return Splits(*windows)


def _windows(path: pathlib.Path, data: Data, model: GPTConfig) -> Windows:
    ids = tokens(path, data.processor)
    windows = Windows(ids, model.context)
    if len(windows) < 1:
        raise DataError(f"{path}: {len(ids)} tokens; expected at least a window of {model.context} + 1")
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise DataError(f"{path}: token ids from {ids.min()} to {ids.max()}; expected 0 to {model.vocab_size - 1}")
    return windows


def tokens(path: pathlib.Path, processor: str) -> np.ndarray:
    """Token ids (N,), int32, of a file. Raises: DataError."""
    try:
        if path.suffix == ".bin":
            return np.fromfile(path, np.uint16).astype(np.int32)
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
            if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
                raise DataError(f"{path}: {found.dtype} of shape {found.shape}; expected integers in one dimension")
            return found.astype(np.int32)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return np.asarray(_tokenizer(pathlib.Path(processor)).encode(text, add_special_tokens=False).ids, np.int32)


def _tokenizer(folder: pathlib.Path) -> Any:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"config.data.processor: no tokenizer.json in {str(folder)!r}; expected the checkpoint's, or give token ids"
        )
    try:
        return importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except ImportError:
        raise DataError(f"{file}: reading it needs the library tokenizers; pip install tokenizers") from None
    except Exception as error:  # its own are plain ones
        raise DataError(f"cannot read {file}: {error}") from None
