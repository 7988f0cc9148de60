"""SIGINT and SIGTERM between steps: a KeyboardInterrupt anywhere else could tear a save apart, or be swallowed by a callback."""

import signal
import threading
import types
from typing import Any


class Interrupted(Exception):
    """A run that was asked to stop, and stopped behind a checkpoint. step: of that checkpoint. status: for the process to exit with."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"interrupted; step {step} is saved, and the same command continues there")
        self.step, self.status = step, 128 + signal_number


class Interrupts:
    """While it is entered, the first signal is only noted, in `received`; a second one acts as if this were not there."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Python delivers signals to the main thread alone, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.received = number
        self.__exit__()
