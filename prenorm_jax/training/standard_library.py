"""The source of the Python standard library, as bytes."""

import hashlib
import os
import pathlib
import sysconfig

import numpy as np

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training.data import DataError, Splits
from prenorm_jax.training.experiment import Data
from prenorm_jax.training.windows import Windows

# Tests, demos and what other packages installed are not the library.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "_bundled", "__pycache__"}
)
HELD_OUT_SIXTEENTHS = 1  # of the files, by hash


def load(data: Data, model: ViTConfig | GPTConfig) -> Splits:
    """`read` of data.root, or of the running interpreter's own library."""
    assert isinstance(model, GPTConfig)
    return read(data.root or sysconfig.get_path("stdlib"), model.context)


def read(root: str, context: int) -> Splits:
    """The .py files below `root`, in order of their path, joined by a zero byte (which no Python source contains).

    A file is held out if the hash of its relative path says so: adding a file moves no other file to the other side.
    Raises DataError, naming the file or folder, where it can't be read or where a side has less than one window.
    """
    base = pathlib.Path(root)
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in _python_files(base):
        name = path.relative_to(base).as_posix()
        try:
            texts[is_held_out(name)].append(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
    train, held_out = (Windows(_join(texts[side]), context) for side in (False, True))
    for side, windows in (("training", train), ("validation", held_out)):
        if len(windows) < 1:
            raise DataError(f"{root}: its .py files hold no {side} window of {context} + 1 bytes")
    return Splits(train, held_out)


def is_held_out(relative_path: str) -> bool:
    """Whether a file of the standard library is for validation; depends on its relative path alone."""
    return hashlib.sha256(relative_path.encode()).digest()[0] % 16 < HELD_OUT_SIXTEENTHS


def _python_files(base: pathlib.Path) -> list[pathlib.Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    found: list[pathlib.Path] = []
    for folder, folders, names in os.walk(base, onerror=refuse):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(base).as_posix())


def _join(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(texts), np.uint8)
