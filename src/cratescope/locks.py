"""One process per folder and stage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cratescope.errors import UserError
from cratescope.files import folder_there, make_folder

_held: set[Path] = set()
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def locked(folder: Path, stage: str, wait: bool = False) -> Iterator[None]:
    """Let one process at a time run `stage` on `folder`; the same process may lock it again inside.

    The kernel releases the lock when its process ends, even if killed. A disk that has no locks, or cannot be
    written to at all, is not locked. Unless it is to `wait`, UserError says which process holds the lock.
    """
    path = Path(os.path.realpath(folder)) / f".{stage}.lock"
    if path in _held:
        yield
        return
    with folder_there(folder):  # a refused command leaves no empty folder behind
        file = _lock(folder, path, wait)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            if file is not None:
                path.unlink(missing_ok=True)
                file.close()


def _lock(folder: Path, path: Path, wait: bool) -> IO[str] | None:
    """The locked file, which names its holder; None where locking is impossible."""
    while True:
        make_folder(folder)  # its holder may have just removed that too
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as it is locked)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None
        try:
            # Not flock: a forked worker would inherit the lock and keep it after its parent dies.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{folder}: in use by {holder}; wait for its end, or stop it") from error
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            return None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(f"{_this_process()}\n")
            file.flush()
            return file
        file.close()  # the previous holder has just removed it


def _this_process() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    return f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({command})"
