"""The language that terms are written in: classes of words, and places, read from one TOML file (language.toml).

A file of the user's replaces the packaged language, or adds to it with `extends = "english"`.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from cratescope.errors import UserError, first_line
from cratescope.explain.config import LanguageConfig
from cratescope.explain.terms.patterns import compiled
from cratescope.files import decode_text

PACKAGED = Path(__file__).with_name("language.toml")
SECTIONS = ("lists", "spellings", "shapes", "parts", "places", "joints")
PARTS = ("endings", "beginnings")
JOINTS = ("places",)
FIX = "`cratescope terms --toml` prints the packaged language as an example"


@dataclass(frozen=True)
class Back:
    """A place behind X: X is the word `back` words before."""

    back: int

    def __str__(self) -> str:
        return "X is the word before" if self.back == 1 else f"X is the word {self.back} words before"


@dataclass(frozen=True)
class Among:
    """A place among X: the value is the share of X among the `last` words before."""

    last: int

    def __str__(self) -> str:
        return f"the share of X among the {self.last} words before"


@dataclass(frozen=True)
class First:
    """The word before is of the class `after`."""

    after: str

    def __str__(self) -> str:
        return f"the word before is one of: {self.after}"


@dataclass(frozen=True)
class Inside:
    """Between a sign of `open` and one of `close`; a word of the class `ends` ends all that is open.

    A sign that is in both opens and closes by turns.
    """

    open: str
    close: str
    ends: str

    def __str__(self) -> str:
        return f"between any of {self.open} and of {self.close}, up to {self.ends}"


@dataclass(frozen=True)
class Repeated:
    """The same word, of `repeated` letters or more, stood before in the window."""

    repeated: int

    def __str__(self) -> str:
        return f"the same word, of {self.repeated} letters or more, stood before"


@dataclass(frozen=True)
class Rest:
    """A token that goes on with the word of the token before."""

    rest: bool

    def __str__(self) -> str:
        return "goes on with the word of the token before"


@dataclass(frozen=True)
class Start:
    """The beginning of a text, which may follow a word of the class `after`.

    1 on its first word, and half of it `start` words later.
    """

    start: int
    after: str

    def __str__(self) -> str:
        return f"the first word of the text or after {self.after}; half of that {self.start} words later"


Place = Back | Among | First | Inside | Repeated | Rest | Start
_PLACES: tuple[tuple[type[Place], dict[str, type]], ...] = (
    (Back, {"back": int}),
    (Among, {"last": int}),
    (First, {"after": str}),
    (Inside, {"open": str, "close": str, "ends": str}),
    (Repeated, {"repeated": int}),
    (Rest, {"rest": bool}),
    (Start, {"start": int, "after": str}),
)


@dataclass(frozen=True, eq=False)
class Language:
    """Classes of words by name, and places by phrase.

    lists: words in lower case. spellings, shapes: patterns that match a whole word, or its shape. joints: the places
    that may follow what a word is. sha256: of the files it was read from.
    """

    name: str
    version: int
    sha256: str
    lists: Mapping[str, frozenset[str]]
    spellings: Mapping[str, re.Pattern[str]]
    shapes: Mapping[str, re.Pattern[str]]
    endings: tuple[str, ...]
    beginnings: tuple[str, ...]
    places: Mapping[str, Place]
    joints: frozenset[str]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes of words, in the order of the file."""
        return (*self.lists, *self.spellings, *self.shapes)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what an explanation means."""
        return {"language": self.name, "language_version": self.version, "language_sha256": self.sha256}

    @cached_property
    def _lists_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, words in self.lists.items():
            for word in words:
                found.setdefault(word, []).append(name)
        return found

    def classes_of(self, word: str) -> list[str]:
        """The names of all classes that a word is in."""
        form = shape(word)
        return [
            *self._lists_of.get(word.lower(), ()),
            *(name for name, pattern in self.spellings.items() if pattern.fullmatch(word)),
            *(name for name, pattern in self.shapes.items() if pattern.fullmatch(form)),
        ]

    @cached_property
    def _by_length(self) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
        """Endings and beginnings by their number of letters."""
        found: tuple[dict[int, set[str]], dict[int, set[str]]] = {}, {}
        for by_length, parts in zip(found, (self.endings, self.beginnings), strict=True):
            for part in parts:
                by_length.setdefault(len(part), set()).add(part)
        return found

    def endings_of(self, word: str) -> list[str]:
        """The listed endings that a word has."""
        lower = word.lower()
        found = (lower[-n:] for n, parts in self._by_length[0].items() if lower[-n:] in parts)
        return [part for part in found if ends_in(lower, part)]

    def beginnings_of(self, word: str) -> list[str]:
        """The listed beginnings that a word has."""
        lower = word.lower()
        found = (lower[:n] for n, parts in self._by_length[1].items() if lower[:n] in parts)
        return [part for part in found if begins_with(lower, part)]

    def listing(self) -> Iterator[str]:
        """All of it, a line for each class, part and place."""
        yield f"language {self.name}, version {self.version}, sha256 {self.sha256[:12]}"
        for name, words in self.lists.items():
            yield f"{name}: {' '.join(sorted(words))}"
        for title, patterns in (("spelled", self.spellings), ("of the shape", self.shapes)):
            yield from (f"{name}: {title} {pattern.pattern}" for name, pattern in patterns.items())
        yield f'words that end in "...": {" ".join(self.endings)}'
        yield f'words that begin with "...": {" ".join(self.beginnings)}'
        for phrase, place in self.places.items():
            more = "; may follow what a word is" if phrase in self.joints else ""
            yield f"{phrase}{' X' * isinstance(place, Back | Among)}: {place}{more}"


def print_language(config: LanguageConfig) -> str:
    """The text of `cratescope terms`. Errors as of `load_language`."""
    if config.toml:
        return decode_text(PACKAGED.read_bytes(), errors="strict").rstrip("\n")
    return "\n".join(load_language(config.language).listing())


def ends_in(word: str, ending: str) -> bool:
    """Does a word of letters, in lower case, end in `ending` and have two letters more?"""
    return word.endswith(ending) and len(word) >= len(ending) + 2 and word.isalpha()


def begins_with(word: str, beginning: str) -> bool:
    """Does a word of letters, in lower case, begin with `beginning` and have three letters more?"""
    return word.startswith(beginning) and len(word) >= len(beginning) + 3 and word.isalpha()


def shape(word: str) -> str:
    """A word with A for capital letters, a for small ones, x for letters of neither kind and 0 for digits."""
    return "".join(_shape(character) for character in word)


def _shape(character: str) -> str:
    if character.isupper():
        return "A"
    if character.islower():
        return "a"
    if character.isdigit():
        return "0"
    return "x" if unicodedata.category(character)[0] in "LM" else character


def load_language(path: Path | None = None) -> Language:
    """The language of a file; the packaged one without a file.

    Raises:
        UserError: the file is missing or no TOML, or something in it is unknown, missing, empty, of the wrong kind, no
            pattern or one that may take for ever, or there twice.
    """
    path = path or PACKAGED
    content, table = _read(path)
    base: dict[str, Any] = {}
    if "extends" in table:
        packaged, base = _read(PACKAGED)
        if table["extends"] != base["name"]:
            raise UserError(f'{path}: extends = {table["extends"]!r}: only "{base["name"]}" can be extended')
        content = packaged + content
    return _Reader(path).language(table, base, hashlib.sha256(content).hexdigest())


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    if not path.is_file():
        what = "is a folder or device, not a file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; {FIX}")
    content = path.read_bytes()
    try:
        return content, tomllib.loads(decode_text(content, errors="strict"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, brackets without end
        raise UserError(f"{path}: not valid TOML ({first_line(error)}); {FIX}") from error


@dataclass(frozen=True)
class _Reader:
    """Checks what a file says; problems name the file and the key."""

    path: Path

    def language(self, table: dict[str, Any], base: dict[str, Any], sha256: str) -> Language:
        self._known("", table, ("name", "version", "extends", *SECTIONS))
        name, version = self._kind("name", table, str), self._kind("version", table, int)
        if not name:
            self._refuse("name", "is empty; give the language a name")
        sections = {section: self._section(section, table, base) for section in SECTIONS}
        self._known("parts.", sections["parts"], PARTS)
        self._known("joints.", sections["joints"], JOINTS)
        self._check_names(sections)
        spellings, shapes = (
            self._each(section, sections[section], self._pattern) for section in ("spellings", "shapes")
        )
        lists = self._each("lists", sections["lists"], self._words)
        endings, beginnings = (self._parts(key, sections["parts"]) for key in PARTS)
        places = self._each("places", sections["places"], self._place)
        classes = {*lists, *spellings, *shapes}
        for phrase, place in places.items():
            self._check_class(f"places.{phrase}", place, classes)
        joints = self._joints(sections["joints"], places)
        return Language(
            name=name,
            version=version,
            sha256=sha256,
            lists={name: frozenset(word.lower() for word in words) for name, words in lists.items()},
            spellings=spellings,
            shapes=shapes,
            endings=endings,
            beginnings=beginnings,
            places=places,
            joints=joints,
        )

    def _refuse(self, key: str, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: {key}: {problem}")

    def _known(self, where: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                self._refuse(f"{where}{key}", f"unknown; use {', '.join(known)}")

    def _kind(self, key: str, table: dict[str, Any], kind: type) -> Any:
        value = table.get(key)
        if type(value) is not kind:
            wanted = {str: "a string", int: "a whole number", bool: "true", dict: "a table"}[kind]
            self._refuse(key, "is missing" if value is None else f"is {value!r}, which has to be {wanted}")
        return value

    def _section(self, section: str, table: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
        own = self._kind(section, table, dict) if section in table else {}
        return base.get(section, {}) | own

    def _each(self, section: str, table: dict[str, Any], read: Callable[[str, Any], Any]) -> dict[str, Any]:
        return {name: read(f"{section}.{name}", value) for name, value in table.items()}

    def _words(self, key: str, value: Any) -> tuple[str, ...]:
        """Words in one string with spaces between them, or in an array."""
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            self._refuse(key, "has to be words in one string, or an array of strings")
        if not words or not all(word.strip() for word in words):
            self._refuse(key, "is empty; list words, or leave it out")
        return tuple(dict.fromkeys(words))

    def _parts(self, key: str, table: dict[str, Any]) -> tuple[str, ...]:
        return tuple(word.lower() for word in self._words(f"parts.{key}", table[key])) if key in table else ()

    def _pattern(self, key: str, value: Any) -> re.Pattern[str]:
        if not isinstance(value, str) or not value:
            self._refuse(key, f"is {value!r}, which has to be a regular expression in a string")
        try:
            return compiled(value)
        except (re.error, ValueError, OverflowError, RecursionError) as error:  # what Python raises for odd ones
            why = first_line(error)
            raise UserError(f"{self.path}: {key}: {value!r:.200} is no regular expression to use ({why})") from error

    def _place(self, key: str, value: Any) -> Place:
        kinds = {tuple(sorted(keys)): kind for kind, keys in _PLACES}
        keys = dict(_PLACES)
        if not isinstance(value, dict) or tuple(sorted(value)) not in kinds:
            known = " or ".join("{ " + ", ".join(keys) + " }" for _, keys in _PLACES)
            self._refuse(key, f"is {value!r}, which has to be one of {known}")
        kind = kinds[tuple(sorted(value))]
        for name, expected in keys[kind].items():
            self._kind(name, value, expected)
            if not value[name] or (expected is int and value[name] < 1):
                self._refuse(f"{key}.{name}", f"is {value[name]!r}; it has to be 1 or more, true, or not empty")
        return kind(**value)

    def _check_class(self, key: str, place: Place, classes: set[str]) -> None:
        named = getattr(place, "ends", None) or getattr(place, "after", None)
        if named is not None and named not in classes:
            self._refuse(key, f"{named!r} is no class of this file")

    def _joints(self, table: dict[str, Any], places: dict[str, Place]) -> frozenset[str]:
        value = table.get("places", [])
        lines = value.splitlines() if isinstance(value, str) else value
        phrases = self._words("joints.places", [line for line in lines if line]) if "places" in table else ()
        for phrase in phrases:
            if phrase not in places:
                self._refuse("joints.places", f"{phrase!r} is no place of this file")
        return frozenset(phrases)

    def _check_names(self, sections: dict[str, dict[str, Any]]) -> None:
        """A name is read back out of explanations: it is of plain words, there once, and no other term begins in it."""
        seen: dict[str, str] = {}
        for section in ("lists", "spellings", "shapes", "places"):
            for name in sections[section]:
                if not re.fullmatch(r"[^\W_][\w'-]*( [\w'-]+)*", name):
                    self._refuse(f"{section}.{name}", "a name is of words with single spaces between them, no signs")
                if name in seen:
                    self._refuse(f"{section}.{name}", f"is in [{seen[name]}] as well; rename one of them")
                seen[name] = section
        for name, section in seen.items():
            for phrase in sections["places"]:
                if name != phrase and f" {phrase} " in f" {name} ":
                    if section == "places" and name.endswith(f" {phrase}"):
                        continue  # the longer one is read first
                    self._refuse(f"{section}.{name}", f"holds the place {phrase!r}, so it cannot be read back; rename")
                # "numbers two words" and "after" would read as "numbers" and "two words after".
                for longer in sections["places"]:
                    if longer.endswith(f" {phrase}") and f" {name}".endswith(f" {longer.removesuffix(f' {phrase}')}"):
                        self._refuse(
                            f"{section}.{name}", f"ends as {longer!r} begins, so it cannot be read back; rename"
                        )
