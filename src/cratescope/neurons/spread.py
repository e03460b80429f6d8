"""One stage as Ray tasks on the GPUs of one or many machines, each of them one worker of n."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cratescope.run import UserError


def spread(command: Callable[[Any], str], config: Any) -> str:
    """Run `command` as `config.ray` workers and return its output when all of them have finished.

    A cluster named by RAY_ADDRESS is used, else this machine. The run directory has to be on a disk that all share.

    Raises:
        UserError: Ray is not installed, or whatever a worker refuses.
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
