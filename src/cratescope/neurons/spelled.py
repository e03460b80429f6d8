"""Edits as they are written on the command line, such as `1:37=4x`, `sae/bt16/1:5+=2 @generated if 0:12>0.5`.

[SITE/]LAYER:NEURON OPERATOR NUMBER[UNIT] [@WHERE] [if [LAYER:]NEURON > NUMBER]

=  set        `1:37=2`, `1:37=4x` (4 times its maximum), `1:37=1q` (its 99.9 % quantile), `1:37=mean`
+= add        `1:37+=-0.5x`
*= scale      `1:37*=0` ablates
<= >= cap     `1:37<=3` is at most 3, `1:37>=0` at least 0
@  where      all (as without it), prompt, generated, or positions from 0 such as `@0,3,4`
if            a condition: neuron of the same site, of the same layer or one before it
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cratescope.errors import UserError
from cratescope.neurons.sites import Site
from cratescope.neurons.steer import Above, Edit, Operation, Unit, Where

SITE = r"(?:([\w.{}:/-]+)/(?=\d+:\d))?"
NEURON = r"(\d+):(\d+)\s*"
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
OPERATORS: dict[str, Operation] = {"=": "set", "+=": "add", "*=": "scale", "<=": "cap", ">=": "cap"}
UNITS: dict[str, Unit] = {"": "raw", "x": "maximum", "q": "quantile"}


class _Reader:
    """Reads a text piece by piece, and says where it cannot."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def take(self, pattern: str, expected: str) -> re.Match[str]:
        """The piece that begins here, and what is after it comes next. UserError: there is none."""
        found = re.compile(pattern, re.ASCII).match(self.text, self.place)
        if found is None:
            there = f"{self.text[self.place :]!r:.40}" if self.place < len(self.text) else "the end"
            raise UserError(f"--edit {self.text!r:.80}, character {self.place + 1}: expected {expected}, not {there}")
        self.place = found.end()
        return found

    def may(self, pattern: str) -> bool:
        """Whether such a piece begins here; if so it is passed over."""
        found = re.compile(pattern, re.ASCII).match(self.text, self.place)
        self.place = found.end() if found else self.place
        return found is not None


def read_edit(text: str, site_of: Callable[[str | None], Site]) -> Edit:
    """The edit that is written so; `site_of` gives the site of a name, or of None where the text has none.

    Raises:
        UserError: not of this form (names the character where it ends to be), no such site, or no such edit.
    """
    reader = _Reader(text)
    reader.take(r"\s*", "an edit")
    name = reader.take(SITE, "a site")[1]
    layer, index = reader.take(NEURON, "LAYER:NEURON such as 1:37").groups()
    operator = reader.take(r"(\+=|\*=|<=|>=|=)\s*", "one of = += *= <= >=")[1]
    amount = _amount(reader, operator)
    where, when = _where(reader), _when(reader)
    reader.take(r"\s*$", "@WHERE, a condition such as `if 12>0.5`, or the end")
    return Edit(site_of(name), int(layer), int(index), OPERATORS[operator], **amount, where=where, when=when)


def _amount(reader: _Reader, operator: str) -> dict[str, Any]:
    """The number with its unit, as arguments of an edit."""
    if operator == "=" and reader.may(r"mean\b"):
        return {"value": 1.0, "unit": "mean"}
    words = "a number such as 2, 4x or 1q" + (", or mean" if operator == "=" else "")
    number = float(reader.take(NUMBER, "a factor such as 0 or 2.5" if operator == "*=" else words)[1])
    unit = UNITS["" if operator == "*=" else reader.take(r"([xq]?)", "a unit")[1]]
    ends = {"<=": "high", ">=": "low"}
    return {ends.get(operator, "value"): number, "unit": unit}


def _where(reader: _Reader) -> Where | tuple[int, ...]:
    if not reader.may(r"\s*@\s*"):
        return "all"
    for word in ("all", "prompt", "generated"):
        if reader.may(rf"{word}\b"):
            return word
    found = reader.take(r"\d+(?:,\d+)*", "all, prompt, generated, or positions such as 0,3")
    return tuple(map(int, found[0].split(",")))


def _when(reader: _Reader) -> Above | None:
    if not reader.may(r"\s+if\b\s*"):
        return None
    layer, index = reader.take(r"(?:(\d+):)?(\d+)\s*", "a neuron such as 12 or 0:12").groups()
    reader.take(r">\s*", ">")
    number = reader.take(NUMBER, "a number such as 0.5")[1]
    return Above(int(index), float(number), None if layer is None else int(layer))
