"""One process to a workdir: a second one is refused, and a lock whose owner died is nobody's.

The lock is the operating system's (fcntl), which lets go of it with the process however that ends; the file says who holds it and stays.
Over NFS it holds between hosts as far as the server supports locks.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

from prenorm_jax.models.config import ConfigError


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds workdir/lock while it is entered; `workdir` has to exist.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(pathlib.Path(folder)):
    ...     print((pathlib.Path(folder) / "lock").read_text().startswith("process "))
    True

    Raises: ConfigError where another process holds it, and names that.
    """
    path = workdir / "lock"
    # A lock of this kind is a process's, and not inherited: a data worker that outlives a killed run does not keep it.
    with path.open("a+") as file:
        _take(file, workdir)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def refuse_in_use(workdir: pathlib.Path) -> None:
    """Raises ConfigError where another process holds workdir/lock: what lies in the workdir may be changing. Writes nothing."""
    path = workdir / "lock"
    if path.exists():
        with path.open("r+") as file:
            _take(file, workdir)


def _take(file: IO[str], workdir: pathlib.Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise ConfigError(
            f"workdir: {workdir} is in use by {owner}; allowed: another --workdir, or wait until it has ended"
        ) from None
