"""Named arrays that lie in files: what each is, and how to read it when it is wanted."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

MAX_RANK = 32
MAX_NAME = 4096


class FormatError(ValueError):
    """A file that is not what it claims to be; the message says which, what is wrong with it and what was expected."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file.

    Args:
      name: as the file has it.
      dtype, shape: of the array; bfloat16 is `ml_dtypes.bfloat16`.
      file: where it lies.
      read: reads it, as a host array of its own that the caller may change.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.size * self.dtype.itemsize


def is_shape(sizes: Any, itemsize: int) -> bool:
    """Whether numpy has arrays of these sizes: integers, and neither too many nor too large (an empty one counts as if it were not)."""
    return (
        isinstance(sizes, list | tuple)
        and len(sizes) <= MAX_RANK
        and all(type(size) is int and size >= 0 for size in sizes)
        and math.prod(size or 1 for size in sizes) * itemsize < 1 << 63
    )


SHAPE = f"at most {MAX_RANK} sizes, none negative, and what they make up to be addressable"


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is one that weights are computed with: float64, float32, float16 or bfloat16."""
    return dtype in FLOATS


FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}

# A name is never a path on a disk here, but it may become one elsewhere: nothing that climbs out of a folder, nothing unprintable.
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|^/|^[A-Za-z]:|(^|/)\.\.(/|$)|^$")


def checked_name(name: str, file: pathlib.Path) -> str:
    """The name of a tensor. Raises: FormatError for one that is empty, absolute, unprintable, too long or has '..' in it."""
    if _BAD_NAME.search(name) or len(name) > MAX_NAME:
        raise FormatError(
            f"{file}: a tensor is named {name[:80]!r}; expected a relative name without '..', of at most {MAX_NAME} letters"
        )
    return name
