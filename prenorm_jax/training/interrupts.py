"""SIGINT and SIGTERM between steps: a KeyboardInterrupt anywhere else could tear a save apart, or be swallowed by a callback.

Where a run is several processes, all of them have to stop behind the same step, whichever of them the signal reached. JAX's preemption
service (a notice through the coordinator, and the first step that none has begun yet) agrees on that step; its own handler has SIGTERM.
"""

import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A run that was asked to stop, and stopped behind a checkpoint. step: of that checkpoint. status: for the process to exit with."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"interrupted; step {step} is saved, and the same command continues there")
        self.step, self.status = step, 128 + signal_number


class Received(Exception):
    """A signal has come, and the work at hand can be left."""


class Interrupts:
    """While it is entered, the first signal is only noted; a second one acts as if this were not there."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._several = jax.process_count() > 1

    def __enter__(self) -> "Interrupts":
        # Python delivers signals to the main thread alone, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            noted = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def stop_behind(self, step: int) -> int | None:
        """The signal because of which the run is to stop behind `step`, the same in all of its processes, or None. To be asked at every
        step: several processes count them."""
        if not self._several:
            return self.now
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    @property
    def now(self) -> int | None:
        """The signal because of which the run may stop without asking anybody: it is one process."""
        return None if self._several else self.received

    def leave(self) -> None:
        """Raises: Received, where the run may stop."""
        if self.now is not None:
            raise Received

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.received = number
        self.__exit__()
        if self._several:  # hand it to the service
            signal.raise_signal(signal.SIGTERM)
