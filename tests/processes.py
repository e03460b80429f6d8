"""Commands in processes of their own, to be killed. They are forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from cratescope.cli import run_and_exit

PRELOADED = ["cratescope.lm.train", "cratescope.explain.judge", "cratescope.report.report"]


def start(arguments: Sequence[str], environment: Mapping[str, str] | None = None, stderr: str = os.devnull):
    """`cratescope` with these arguments, the leader of a group of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=([*arguments], {**(environment or {})}, str(stderr)))
    process.start()
    return process


def kill_when(process: BaseProcess, ready: Callable[[], bool]) -> None:
    """Kill the command and what it has started as soon as `ready()`; it must not have ended before."""
    deadline = time.monotonic() + 120
    while process.is_alive() and not ready():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.003)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"


def _command(arguments: list[str], environment: dict[str, str], stderr: str) -> None:
    os.setsid()
    os.environ.update(environment)
    with open(os.devnull, "w") as sys.stdout, Path(stderr).open("w") as sys.stderr:
        run_and_exit(arguments)
