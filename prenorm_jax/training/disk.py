"""A disk that is full, told in one line whoever notices it: Python, Orbax's threads, TensorStore."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from prenorm_jax.models.config import ConfigError

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
            f"{workdir}: no space left on the disk; stopped{error.told if isinstance(error, NoRoom) else ''}. Rows and checkpoints that "
            "were complete are kept: free some space, and the same command continues from the newest"
        ) from error


@contextlib.contextmanager
def removed_workdirs_told(workdir: pathlib.Path) -> Iterator[None]:
    """Raises FileNotFoundError, in one line, in place of what comes of a workdir that is removed under a run; everything else passes."""
    try:
        yield
    except (OSError, ValueError) as error:  # Python's and Orbax's; TensorStore's
        if isinstance(error, ConfigError) or (workdir / "checkpoints").is_dir():
            raise
        raise FileNotFoundError(
            f"{workdir}: its checkpoints are gone; stopped. Something removed or moved them while the run was writing"
        ) from error


class NoRoom(OSError):
    """A save that was not begun, because it would not fit. told: the figures."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.told = f" ({free / 1e6:,.1f} MB are free, a checkpoint takes about {wanted / 1e6:,.1f} MB)"


def require_room(folder: pathlib.Path, wanted: int) -> None:
    """Raises NoRoom where fewer than `wanted` bytes are free. What it can't see (a quota, another writer) shows in the writing."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise NoRoom(wanted, free)


def taken(folder: pathlib.Path) -> int:
    """Bytes that a folder takes on its disk; what vanishes meanwhile counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from or in the handling of, says that a disk is full."""
    seen = 0
    while error is not None and seen < 20:
        if (isinstance(error, OSError) and error.errno in FULL) or any(word in str(error) for word in WORDS):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
