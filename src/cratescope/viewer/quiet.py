"""When the viewer may do work that nobody waits for: not while a page is being opened."""

from __future__ import annotations

import threading
import time

CALM, LONGEST = 0.7, 5.0
"""Seconds without a request, and how long they are waited for."""
SHORTEST = 0.05
"""Seconds between two looks."""


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

    def wait(self, calm: float = CALM, longest: float = LONGEST) -> None:
        """Until no request has come for `calm` seconds, or `longest` have passed."""
        start = time.monotonic()
        while time.monotonic() - start < longest:
            with self._lock:
                left = max(calm, SHORTEST) if self._running else self._last + calm - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, SHORTEST))
