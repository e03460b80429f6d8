"""Errors that a user can fix, and plain words for those of the system and of other libraries."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what is wrong, where, and the fix (exit code 2)."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run after saving its work; the exit code is 128 plus the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


_PLAINLY = {
    "weights_only": "its weights hold Python objects, which could run code and are never loaded; get safetensors",
    "custom code": "it needs code of its own, which is never run; take one whose class transformers has",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
}
"""Our words for errors whose own advice is impossible here or would run a stranger's code, by a part of their text."""


def first_line(error: BaseException) -> str:
    """One line of another library's error."""
    if told := next((told for sign, told in _PLAINLY.items() if sign in str(error)), None):
        return told
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


@contextlib.contextmanager
def as_user_error(
    what: str, fix: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Turn another library's error into a UserError: `what`, a line of the library's in brackets, and the `fix`.

    kinds: all of them by default, since what libraries raise on damaged files or foreign models depends on their bytes.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what} ({first_line(error)}); {fix}") from error


def last_line(error: BaseException) -> str:
    """The last line instead, for errors that end with their cause, without the name of its class."""
    line = next(reversed(str(error).strip().splitlines()), type(error).__name__).strip()
    return re.sub(r"^\w+Error: ", "", line)


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
UNUSABLE = {
    errno.EROFS: "the disk is read-only; name a path on another one",
    errno.EACCES: "no permission; change it, or name another path",
    errno.EPERM: "not permitted; name another path",
    errno.ENOTDIR: "there is a file where a folder has to be; move it, or name another path",
    errno.EEXIST: "there is a file where a folder has to be; move it, or name another path",
    errno.EISDIR: "there is a folder where a file has to be; move it, or name another path",
    errno.ENAMETOOLONG: "the name is too long (255 bytes are the most); give a shorter one",
    errno.ELOOP: "links that lead in a circle; name another path",
    errno.EBUSY: "it is in use or the root of a disk; name a folder inside it",
    errno.EMFILE: "too many open files; raise the limit (`ulimit -n`)",
    errno.ENFILE: "too many open files on this machine; close some programs",
    errno.EIO: "the disk fails; save what can be read, and name a path on another one",
    errno.ESTALE: "the network disk has lost it; run the same command again",
    errno.EFBIG: "the file would be larger than this disk or the limit (`ulimit -f`) allows",
    errno.EINVAL: "the disk does not take this name or file; name a path on another one",
    errno.EOPNOTSUPP: "the disk cannot do this; name a path on another one",
    errno.ENODEV: "is a device without a driver; name another path",
    errno.ENXIO: "is a device or pipe with nothing connected to it; name another path",
    errno.ENOTEMPTY: "another process writes there; run the same command again when it has ended",
    errno.EXDEV: "lies on two disks at once; name another path",
}
"""Problem and fix by the system's error number."""


def unusable(error: OSError) -> str | None:
    """Describe in one line a path that the system refuses; None for errors with other causes."""
    if error.errno not in UNUSABLE or error.filename is None:
        return None
    if isinstance(error.filename, int):
        return None
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
    return f"{' and '.join(map(shown_path, names))}: {UNUSABLE[error.errno]}"


def shown_path(path: str | Path) -> str:
    name = str(path)
    return name if len(name) < 300 else f"{name[:150]}...{name[-50:]}"
