"""Token ids in a .bin file: nothing but unsigned 16- or 32-bit integers, as nanoGPT writes them, read where they lie.

Beside files that `prenorm_jax.training.prepare` wrote is a tokens.json, which says their dtype, how many there are, and of which
vocabulary; others are of the dtype that data.token_dtype says.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from prenorm_jax.training.data import DataError

ABOUT = "tokens.json"
LOOKED_AT = 2**13  # bytes of a file, to see whether its ids are of the dtype that is said


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of `count` ids. It is mapped anew for every batch: what is pickled is its path, and what is in memory are the pages read."""

    path: pathlib.Path
    dtype: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> np.ndarray:
        """A copy of the ids at an index of numpy's. Raises: DataError where the file is gone or shorter than it was."""
        try:
            return np.array(np.memmap(self.path, self.dtype, "r", shape=(self.count,))[index])
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.path}: {error}") from error


def open_tokens(path: pathlib.Path, token_dtype: str, vocab_size: int) -> TokenFile:
    """The ids of a .bin file.

    Raises: DataError for a file that is not a whole number of ids, or not as many as tokens.json says, or of a larger vocabulary than
      `vocab_size`.
    """
    about = _about(path)
    dtype = about.get("dtype", token_dtype) if about else token_dtype
    if dtype not in ("uint16", "uint32"):
        raise DataError(f"{path.parent / ABOUT}: dtype {dtype!r}; expected uint16 or uint32")
    try:
        with path.open("rb") as stream:
            first = stream.read(LOOKED_AT)
            size = stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    count, rest = divmod(size, np.dtype(dtype).itemsize)
    if rest:
        raise DataError(f"{path}: {size} bytes, no whole number of {dtype} ids; it was cut off, or has another dtype")
    if about:
        said = about.get(path.stem, {}).get("tokens")
        if said != count:
            raise DataError(f"{path}: {count} ids, and {said} in {ABOUT} beside it; it was cut off or replaced")
        if about.get("vocab_size", 0) > vocab_size:
            raise DataError(
                f"{path}: of a vocabulary of {about['vocab_size']}; expected at most config.model.vocab_size = {vocab_size}"
            )
    most = (vocab_size - 1) >> 16  # of the upper half of an id
    if not about and dtype == "uint16" and _looks_wider(np.frombuffer(first, np.uint16), most):
        raise DataError(
            f"{path}: every second uint16 id is at most {most}, as in a file of uint32; expected config.data.token_dtype as the file was "
            "written (--config.data.token_dtype=uint32)"
        )
    return TokenFile(path, dtype, count)


def _looks_wider(first: np.ndarray, most: int) -> bool:
    """Whether the first ids of a uint16 file are the halves of uint32 ones: lower and upper, of which the upper are `most` at most."""
    return first.size >= 32 and first[1::2].max() <= most < first[0::2].max()


def _about(path: pathlib.Path) -> dict[str, Any]:
    file = path.parent / ABOUT
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    side = found.get(path.stem, {}) if isinstance(found, dict) else None
    if not isinstance(side, dict) or not isinstance(found.get("vocab_size", 0), int):
        raise DataError(f"{file}: not what prenorm_jax.training.prepare writes; expected that, or no such file")
    return found
