"""The console that messages go to, and the one style of progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

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


def step_bar(says: str, shown: bool = True, **options: Any) -> Progress:
    """A bar of a training's steps that ends in `says`, a format of its task; `options` as of rich's Progress."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn(says)
    name = TextColumn("{task.description}", markup=False)
    return Progress(name, *columns, console=STDERR, transient=True, disable=not (shown and bars()), **options)
