"""An explanation by terms as a text, and back: `numbers (+10), the word "of" (+6), articles after commas (-4)`.

The text holds all of the explanation: what is written is what is read, for every explanation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from cratescope.explain.terms.language import Among, Back, Language

LARGEST = 10
"""Weights are whole numbers from -LARGEST to LARGEST, without 0."""
Kind = Literal["class", "word", "piece", "ending", "beginning"]
_QUOTED: dict[str, Kind] = {
    "the word": "word",
    "the sign": "word",
    "the piece": "piece",
    "words that end in": "ending",
    "words that begin with": "beginning",
}
_STRING = r'"(?:[^"\\]|\\.)*"'
_TERM = re.compile(rf'\s*((?:[^"(),]|{_STRING})+?)\s*\(([-+−]?\d+)\)\s*')
_QUOTE = re.compile(rf"({'|'.join(_QUOTED)}) ({_STRING})")


@dataclass(frozen=True)
class What:
    """What a word is: of the class `text`, the word `text` itself (in lower case), a piece of a word, its ending."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        if self.kind == "class":
            return self.text
        sign = self.kind == "word" and not any(character.isalnum() for character in self.text)
        names = {kind: name for name, kind in reversed(_QUOTED.items())}
        return f"{'the sign' if sign else names[self.kind]} {_quoted(self.text)}"


@dataclass(frozen=True)
class Where:
    """Where a word stands: at a place of the language, of those that need it with what the other word is."""

    place: str
    other: What | None = None

    def __str__(self) -> str:
        return self.place if self.other is None else f"{self.place} {self.other}"


@dataclass(frozen=True)
class Term:
    """What a word is, where it stands, or both, and the weight of that in the explanation."""

    what: What | None
    where: Where | None
    weight: int

    @property
    def phrase(self) -> str:
        return " ".join(str(part) for part in (self.what, self.where) if part is not None)

    def __str__(self) -> str:
        return f"{self.phrase} ({self.weight:+d})"


Terms = tuple[Term, ...]


@dataclass(frozen=True)
class Unreadable:
    """Why a text is no explanation in the language."""

    reason: str


def written(terms: Terms) -> str:
    """The text of an explanation."""
    return ", ".join(map(str, terms))


def read(text: str, language: Language) -> Terms | Unreadable:
    """What `written` wrote, in this language; else what is wrong with it."""
    found: list[Term] = []
    place = 0
    while match := _TERM.match(text, place):
        parts = _parts(match[1], language)
        weight = int(match[2].replace("−", "-")) if len(match[2]) < 9 else LARGEST + 1
        if parts is None:
            return Unreadable(f"no term of the language {language.name}: {_short(match[1])}")
        if not 1 <= abs(weight) <= LARGEST:
            return Unreadable(f"a weight that is not from 1 to {LARGEST} or -1 to -{LARGEST}: {_short(match[2])}")
        found.append(Term(*parts, weight))
        place = match.end()
        if place == len(text):
            return tuple(found)
        if text[place] != ",":
            break
        place += 1
    return Unreadable(f"not in terms with weights, such as numbers (+10): {_short(text[place:])}")


def _short(text: str) -> str:
    return json.dumps(text[:40], ensure_ascii=False)


def _parts(phrase: str, language: Language) -> tuple[What | None, Where | None] | None:
    """What and where of a phrase; None when it is no term."""
    if what := _what(phrase, language):
        return what, None
    for name in sorted(language.places, key=len, reverse=True):
        for match in re.finditer(rf"(?:^|(?<= )){name}(?= |$)", phrase):
            before, rest = phrase[: match.start()].rstrip(" "), phrase[match.end() :].lstrip(" ")
            what, where = _what(before, language), _where(name, rest, language)
            if where and (what or not before) and (not what or name in language.joints):
                return what, where
    return None


def _where(name: str, rest: str, language: Language) -> Where | None:
    if not isinstance(language.places[name], Back | Among):
        return None if rest else Where(name)
    other = _what(rest, language)
    return Where(name, other) if other and other.kind != "piece" else None


def _what(phrase: str, language: Language) -> What | None:
    if match := _QUOTE.fullmatch(phrase):
        text = _unquoted(match[2])
        return What(_QUOTED[match[1]], text) if text else None
    return What("class", phrase) if phrase in language.classes else None


def _quoted(text: str) -> str:
    """In quotation marks and on one line, with the escapes of JSON for what would not be seen."""
    found = json.dumps(text, ensure_ascii=False)
    return "".join(c if c == " " or c.isprintable() else json.dumps(c)[1:-1] for c in found)


def _unquoted(text: str) -> str | None:
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        return None
