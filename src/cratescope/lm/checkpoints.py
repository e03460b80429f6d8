"""Checkpoints on disk: marking them complete, finding the newest complete one, and rotation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from cratescope.errors import UserError
from cratescope.files import WHOLE, read_json, sha256
from cratescope.progress import say


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is unchanged since the checkpoint was finished."""
    try:
        marked = read_json(checkpoint / WHOLE, {str: str})
        return bool(marked) and all(sha256(checkpoint / name) == digest for name, digest in marked.items())
    except (UserError, OSError, ValueError):  # a damaged mark may name any file, even an impossible one
        return False


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint; later ones are removed with a warning."""
    for checkpoint in newest_first(folder):
        if is_whole(checkpoint):
            return checkpoint
        say(f"{checkpoint} was cut short or is damaged; using the checkpoint before it", "yellow")
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        else:
            checkpoint.unlink()
    return None


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; called once the newest is complete."""
    for checkpoint in newest_first(folder)[keep:]:
        shutil.rmtree(checkpoint)
