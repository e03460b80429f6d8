"""Checkpoints on disk: the mark that says one is whole, the newest whole one, and which to keep."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from rich.console import Console

from cratescope.run import sha256, write_json

WHOLE = "whole.json"
"""Written last into a checkpoint: the SHA-256 of its files. A checkpoint without it was cut short."""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


def mark_whole(checkpoint: Path) -> None:
    """Say that every file of the checkpoint is on disk, and what is in it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(checkpoint / WHOLE, {str(path.relative_to(checkpoint)): sha256(path) for path in files})


def is_whole(checkpoint: Path) -> bool:
    """Whether every file still is what it was when the checkpoint was finished."""
    try:
        marked = json.loads((checkpoint / WHOLE).read_text())
        return all(sha256(checkpoint / name) == digest for name, digest in marked.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; later ones are removed, with a warning."""
    for checkpoint in newest_first(folder):
        if is_whole(checkpoint):
            return checkpoint
        Console(stderr=True, soft_wrap=True).print(
            f"{checkpoint} was cut short or is damaged; using the checkpoint before it", style="yellow", markup=False
        )
        shutil.rmtree(checkpoint)
    return None


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; called when the newest is whole."""
    for checkpoint in newest_first(folder)[keep:]:
        shutil.rmtree(checkpoint)
