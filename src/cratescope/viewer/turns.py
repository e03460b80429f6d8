"""Whose turn it is to run a model: one thread runs all of them, one job after another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cratescope.errors import UserError

Result = TypeVar("Result")
MOST_WAITING = 4
"""Requests that may wait for their turn."""


class BusyError(UserError):
    """Too many requests wait already."""


class Turns:
    """Jobs of requests, of which a few may wait, and jobs of the viewer itself, which wait as long as it takes."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self.most = most
        self._thread = ThreadPoolExecutor(1, "model")
        self._lock = threading.Lock()
        self._asked = 0

    def ask(self, job: Callable[[], Result]) -> Future[Result]:
        """Do a request's job when its turn comes; cancelled while it waits, it is not done. Raises BusyError."""
        with self._lock:
            if self._asked > self.most:
                raise BusyError(
                    f"{self.most} requests wait for a model already; wait for an answer, or close other pages"
                )
            self._asked += 1
        found = self._thread.submit(job)
        found.add_done_callback(self._done)
        return found

    def do(self, job: Callable[[], Result]) -> Future[Result]:
        """Do a job of the viewer's own."""
        return self._thread.submit(job)

    def _done(self, _: Future[Result]) -> None:
        with self._lock:
            self._asked -= 1
