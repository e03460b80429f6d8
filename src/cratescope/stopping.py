"""A clean stop: signals are noted, so that a training can finish its step and save it."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Asked:
    """While open, the first SIGTERM or SIGINT is noted and does not kill the process; a second SIGINT interrupts it."""

    def __init__(self) -> None:
        self.signal = 0
        """The newest of these signals, 0 before any."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Asked:
        main = threading.current_thread() is threading.main_thread()  # signals can be handled only there
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT) if main}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # the second one: do not wait for the step
        self.signal = number
