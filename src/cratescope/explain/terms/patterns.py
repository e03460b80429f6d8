"""Regular expressions of a user's file, without those whose search may take for ever."""

from __future__ import annotations

import re
from collections.abc import Iterator
from re import _parser  # type: ignore[attr-defined]  # the only way to a pattern's parts
from typing import Any

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_FINAL = ("POSSESSIVE_REPEAT", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT")
"""What such a part has matched once is never tried in another way."""


def compiled(text: str) -> re.Pattern[str]:
    """Compile a pattern.

    A repeat tries all combinations of what each round may match: `(a+)+!` reads 2**n of them in n letters a. So every
    round has to match in one way only, as `(?:-[a-z]++)*` does.

    Raises:
        re.error: no regular expression, or a repeat whose rounds can match in several ways.
        ValueError, OverflowError, RecursionError: other faults that Python finds in a pattern.
    """
    pattern = re.compile(text)
    if _multiplies(_parser.parse(text)):
        raise re.error("it may take for ever: what is repeated has repeats or alternatives in it; write X++ or (?>X|Y)")
    return pattern


def _multiplies(parts: Any) -> bool:
    """Is anywhere a part repeated that can match in several ways?"""
    return any(
        (str(kind) in _REPEATS and value[1] > 1 and _chooses(value[2])) or any(map(_multiplies, _inside(value)))
        for kind, value in parts
    )


def _chooses(parts: Any) -> bool:
    """Can the parts match at one place in several ways, of which a second one is tried when the first leads nowhere?"""
    return any(
        (str(kind) in _REPEATS and value[0] != value[1])
        or str(kind) == "BRANCH"
        or (str(kind) not in _FINAL and any(map(_chooses, _inside(value))))
        for kind, value in parts
    )


def _inside(value: Any) -> Iterator[Any]:
    """The sequences of parts that a part is made of."""
    if isinstance(value, _parser.SubPattern):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _inside(one)
