"""A text, or its token ids, cut into windows of a GPT's context.

A text is read with the tokenizer.json of the checkpoint (the library `tokenizers`); token ids are a .npy file of integers, or a .bin
file (training/token_files.py). A large text is better prepared once: `python -m prenorm_jax.training.prepare`.
"""

import importlib
import pathlib
from typing import Any

import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Missing, Splits, sides
from prenorm_jax.training.experiment import Data
from prenorm_jax.training.token_files import TokenFile, open_tokens
from prenorm_jax.training.windows import Windows, require_ids

# A file of no more ids is looked through before training begins; of a larger one, each batch is.
LOOKED_THROUGH = 2**26


def load(data: Data, model: GPTConfig | ViTConfig) -> Splits:
    """The windows of data.root: a file, or a folder with train and val files.

    Raises: DataError where a file can't be read, is shorter than a window, or holds ids that the model has no row for.
    """
    assert isinstance(model, GPTConfig)
    train, held_out = sides(data.root, "a text, a .npy or .bin of token ids, or a folder with train and val files")
    windows = [_windows(path, data, model) if path else Missing(data.root) for path in (train, held_out)]
    return Splits(*windows)


def _windows(path: pathlib.Path, data: Data, model: GPTConfig) -> Windows:
    ids: np.ndarray | TokenFile
    if path.suffix == ".bin":
        ids = open_tokens(path, data.token_dtype, model.vocab_size)
    else:
        ids = tokens(path, data.processor)
    windows = Windows(ids, model.context, model.vocab_size)
    if len(windows) < 1:
        raise DataError(f"{path}: {len(ids)} tokens; expected at least a window of {model.context} + 1")
    if len(ids) <= LOOKED_THROUGH:
        require_ids(ids[:], model.vocab_size, path)
    return windows


def tokens(path: pathlib.Path, processor: str) -> np.ndarray:
    """Token ids (N,), int32, of a .npy file or a text. Raises: DataError."""
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
            if not isinstance(found, np.ndarray):
                raise DataError(f"{path}: several arrays; expected one, of integers in one dimension")
            if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
                raise DataError(f"{path}: {found.dtype} of shape {found.shape}; expected integers in one dimension")
            return found
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    file = pathlib.Path(processor) / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"config.data.processor: no tokenizer.json in {processor!r}; expected the checkpoint's, or give token ids"
        )
    return np.asarray(read_tokenizer(file).encode(text, add_special_tokens=False).ids, np.int32)


def read_tokenizer(file: pathlib.Path) -> Any:
    """The tokenizer of a tokenizer.json, without its truncation and padding, which are for batches of sentences.

    Raises: DataError where it, or the library, is missing or can't be read.
    """
    try:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except ImportError:
        raise DataError(
            f'{file}: reading it needs the library tokenizers; pip install "prenorm-jax[data]" (or pip install tokenizers)'
        ) from None
    except Exception as error:  # its own are plain ones
        raise DataError(f"cannot read {file}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
