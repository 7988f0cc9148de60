"""A folder that appears whole or not at all: it is written beside its name and renamed when all of it is on disk."""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says where there is no room: on the disk, in a quota, under a limit of a file's size."""


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
    with _locked(path.with_name(f".{path.name}.lock"), path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for written in (*partial.rglob("*"), partial):
                _sync(written)
            os.rename(partial, path)
            _sync(path.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise OSError(f"{path}: {error.strerror} before all was written; what had been is removed") from None
            raise


def lies_in(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether a path is a folder or within it, through links and all."""
    return path.absolute().resolve().is_relative_to(folder.absolute().resolve())


@contextlib.contextmanager
def _locked(file: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    """Nobody else is in here with the same file, which goes with whoever holds it; the system frees it where that one is killed."""
    lock = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not file.exists() or not os.path.samestat(os.fstat(lock), file.stat()):  # its holder was just leaving
                raise BlockingIOError
        except BlockingIOError:
            raise OSError(f"{path}: another run is writing it") from None
        try:
            yield
        finally:
            file.unlink()
    finally:
        os.close(lock)


def _sync(path: pathlib.Path) -> None:
    """A file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
