"""A disk that is full, told in one line whoever notices it: Python, Orbax's threads, TensorStore."""

import contextlib
import errno
import pathlib
from collections.abc import Iterator

FULL = {errno.ENOSPC, errno.EDQUOT}
WORDS = ("No space left on device", "Disk quota exceeded")


class DiskFull(RuntimeError):
    """There is no space to write on; the message is one line."""


@contextlib.contextmanager
def full_disks_told(workdir: pathlib.Path) -> Iterator[None]:
    """Raises DiskFull in place of what says so inside it; everything else passes.

    >>> with full_disks_told(pathlib.Path("runs/a")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    prenorm_jax.training.disk.DiskFull: runs/a: no space left on the disk; ...
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFull(
            f"{workdir}: no space left on the disk; stopped. Rows and checkpoints that were complete are kept: free some space, and the "
            "same command continues from the newest"
        ) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from or in the handling of, says that a disk is full."""
    seen = 0
    while error is not None and seen < 20:
        if (isinstance(error, OSError) and error.errno in FULL) or any(word in str(error) for word in WORDS):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
