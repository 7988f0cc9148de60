"""A run of several processes that has lost one: the others are told by what waits for it, and stop in one line.

Whoever does not notice that way, waiting for the coordinator itself, is ended by JAX when the lost one's heartbeat has been missing for
as long as `jax.distributed.initialize` was told (heartbeat_timeout_seconds).
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax

# What collectives (Gloo, NCCL) and the coordination service say of a peer that is gone.
SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset", "coordination", "heartbeat", "barrier")


class ProcessLost(RuntimeError):
    """Another process of this run is gone; the message is one line."""


@contextlib.contextmanager
def lost_processes_told() -> Iterator[None]:
    """Raises ProcessLost in place of what a collective without one of its processes raises; everything else passes."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not is_sign(error):
            raise
        raise ProcessLost(
            f"another process of this run is gone ({str(error).splitlines()[0][:120]}); stopped. Start all of them again, and they "
            "continue from the newest checkpoint"
        ) from error


def is_sign(error: Exception) -> bool:
    """Whether an error says that a peer is gone."""
    return any(sign in str(error).lower() for sign in SIGNS)


def leave(status: int) -> int:
    """Ends one of several processes at once: Python's way out would wait for the others. Returns `status` where there is only one."""
    if jax.process_count() == 1:
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
