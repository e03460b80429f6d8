"""Commands in processes of their own, to be killed. They are forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


def killed_before(change: int, work: Callable[[], object]) -> int:
    """Do `work` in a fork that is killed with SIGKILL right before its change number `change` (from 0) of the disk.

    A change is a file or folder that is put in place or removed. Returns how many there were before that.
    """
    context = multiprocessing.get_context("fork")
    seen = context.Value("i", 0)
    process = context.Process(target=_dying, args=(change, work, seen))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if seen.value > change else 0), "it failed by itself"
    return seen.value


def _dying(change: int, work: Callable[[], object], seen: Any) -> None:
    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            seen.value += 1
            if seen.value > change:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in ("replace", "rename", "link", "unlink", "remove", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
        work()


def on_threads(code: str, *numbers: int) -> list[str]:
    """What a piece of code prints in processes of so many threads each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    said = []
    for threads in numbers:
        environment = os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return said
