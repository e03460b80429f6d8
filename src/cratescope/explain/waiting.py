"""Keeping results of an LLM: a folder begins with the first useful one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from cratescope.errors import UserError
from cratescope.neurons.kept import Kept

Result = TypeVar("Result")

ENOUGH = 4
"""So many neurons whose windows a server refuses, and no others, are no matter of single neurons."""


@contextlib.contextmanager
def keeping(
    kept: Kept[Result], claim: Callable[[], None], enough: int, useful: Callable[[Result], bool]
) -> Iterator[Waiting[Result]]:
    """Yield what keeps results in a folder that is claimed with the first one, or now if it is claimed already.

    Not before: a model or server that gives no answer leaves no folder, and after a stop with advice another
    --llm-max-tokens is free to start. useful: whether a result shows that the LLM has answered at all.
    Raises the first problem when there are `enough` and nothing else, or nothing was ever answered.
    """
    claim = functools.cache(claim)
    if (kept.folder / "manifest.json").exists():
        claim()
    with kept.writing() as keep:

        def write(result: Result) -> None:
            claim()
            keep(result)

        waiting = Waiting(write, enough)
        yield waiting
        if waiting.problems and not waiting.answered and not any(useful(result) for _, result in kept.all()):
            raise waiting.problems[0]
        waiting.flush()


class Waiting(Generic[Result]):
    """Results that tell only of refusals and useless answers wait until something was answered.

    A wrong option, or too few tokens, spoils every answer; it must not be written as that many skipped neurons.
    """

    def __init__(self, write: Callable[[Result], None], enough: int) -> None:
        self._write, self._enough = write, enough
        self._results: list[Result] = []
        self.problems: list[UserError] = []
        self.answered = False

    def add(self, result: Result, problem: UserError | None) -> None:
        """Write, or keep, what is known of a neuron. Raises the first problem when there are enough and no answer."""
        self._results.append(result)
        self.problems += [problem] if problem else []
        if self.answered:
            self.flush()
        elif len(self.problems) >= self._enough:
            raise self.problems[0]

    def flush(self) -> None:
        """Write what waits."""
        for result in self._results:
            self._write(result)
        self._results = []
