"""A folder that appears whole or not at all: it is written beside its name and renamed when all of it is on disk."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def destination(path: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """A folder to write into; it becomes `path` when the block ends, and vanishes if that fails. What a killed run has left is swept
    away by the next one with the same destination.

    Args:
      path: does not exist yet; its parent does.
      size: bytes that will be written, held against the free disk before the first is.

    Raises: FileExistsError for a destination that exists; OSError where the disk has no room, another run is writing the same, or as
      the system does.
    """
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise FileExistsError(
            f"{path}: exists already, and nothing is overwritten; remove it, or name another destination"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: is no folder; make it first")
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"{path}: needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that disk; nothing was written"
        )
    partial = path.with_name(f".{path.name}.partial")
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{path}: another run is writing it") from None
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            os.rename(partial, path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
        os.close(lock)


def _sync(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
