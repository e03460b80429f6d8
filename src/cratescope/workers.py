"""Several processes: torchrun's ranks, shares of the work, Ray tasks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cratescope.errors import UserError

T = TypeVar("T")


def processes() -> int:
    """Number of processes that train one model together, as torchrun and accelerate set it in the environment.

    Raises UserError, as `rank` does, where that is not such a number.
    """
    return _from_environment("WORLD_SIZE", 1)


def rank(local: bool = False) -> int:
    """This process's number among all of them, or among those of its machine; number 0 writes files and prints."""
    return _from_environment("LOCAL_RANK" if local else "RANK", 0)


def _from_environment(name: str, least: int) -> int:
    """A number that a process launcher sets in the environment; `least` if unset."""
    text = os.environ.get(name, "").strip()
    if text and not (re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= least):
        raise UserError(f"environment variable {name} = {text!r:.60}: has to be a number of {least} or more; unset it")
    return int(text or least)


def worker_of(text: str) -> tuple[int, int]:
    """Split i/n into (i, n); `auto` reads torchrun's environment variables. Raises UserError for anything else."""
    given = f"{rank()}/{processes()}" if text == "auto" else text
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", given)
    if not found or int(found[1]) >= int(found[2]):
        what = f"RANK and WORLD_SIZE {given}" if text == "auto" else text
        raise UserError(f"--worker {what:.60}: has to be i/n with i from 0 to n - 1, such as 0/4")
    return int(found[1]), int(found[2])


def share(items: Sequence[T], worker: str, batch: int) -> list[T]:
    """Select the share of worker i/n: every n-th batch of `batch` items, starting with the i-th.

    Rounding depends on what is computed together, so the batches are the same for any n.
    """
    number, total = worker_of(worker)
    return [item for place, item in enumerate(items) if place // batch % total == number]


def run_on_ray(command: Callable[[Any], str], config: Any) -> str:
    """Run `command` as `config.ray` workers and return its output when all of them have finished.

    A cluster named by RAY_ADDRESS is used, else this machine. The run directory has to be on a disk that all share.
    Raises UserError where Ray is not installed, or whatever a worker refuses.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs the package ray: pip install 'cratescope[ray]'") from error

    shares = [replace(config, ray=0, worker=f"{number}/{config.ray}") for number in range(config.ray)]
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        task = ray.remote(num_gpus=config.ray_gpus)(lambda share: command(share))
        ray.get([task.remote(share) for share in shares])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    finally:
        ray.shutdown()
    # The last worker has finished the stage; only its output is missing.
    return command(replace(config, ray=0, worker="0/1"))
