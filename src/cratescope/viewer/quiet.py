"""When the viewer may do work that nobody waits for: not while a page is being opened."""

from __future__ import annotations

import contextlib
import os
import threading
import time

CALM, LONGEST = 1.0, 10.0
"""Seconds without a request, and how long they are waited for."""
NICE = 10
"""How much a thread of the background gives way to others."""


class Quiet:
    """Knows when the last request came and went."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running, self._last = 0, time.monotonic()

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            self._last = time.monotonic()

    def wait(self) -> None:
        """Until no request has come for `CALM` seconds, or `LONGEST` have passed."""
        start = time.monotonic()
        while time.monotonic() - start < LONGEST:
            with self._lock:
                left = CALM if self._running else self._last + CALM - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.1))


def give_way() -> None:
    """Let this thread run when others do not want to, where the system can do so for a thread (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
