"""The console that messages go to, and the one style of progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

T = TypeVar("T")

STDERR = Console(stderr=True)


def say(line: str, style: str | None = None) -> None:
    """Write a message for the user, however long, on a line of its own."""
    STDERR.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def bars() -> bool:
    """Are progress bars shown? Not in a file or pipe, where each would leave an empty line."""
    return STDERR.is_interactive or STDERR.is_jupyter


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """Iterate over `items` beside a progress bar, which is gone at the end."""
    return track(items, escape(label), total, console=STDERR, transient=True, disable=not bars())
