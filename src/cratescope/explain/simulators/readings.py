"""What a free English phrase says to the letter, and of where words stand: read without a language model.

'the word "of"', 'commas' and 'words that end in "ing"' are *literal*: how a word is written decides. "X after Y",
"X inside brackets" and "the first word of a sentence" name a *place*: X counts only where the place holds. All else is
for the language model to list. Places, and classes of words that look alike, are those of the packaged language of
terms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cratescope.explain.terms.language import Among, Back, Language
from cratescope.explain.terms.phrases import Kind, What

VERSION = "readings-1"
"""Of how phrases are read: raise it when any phrase is read in another way."""
LONGEST = 200
"""A phrase of more characters tells a story; what it says of places is not said of the neuron."""
BEFORE = "before"
"""The place that the language of terms does not have: explainers of the next token have no use for it."""


@dataclass(frozen=True)
class Listed:
    """What the language model would list for a phrase."""

    phrase: str


@dataclass(frozen=True)
class Literal:
    """Any of these."""

    whats: tuple[What, ...]


@dataclass(frozen=True)
class Placed:
    """`what`, or any token without it, at a place of the language or BEFORE; `other` is what the place is next to."""

    what: Reading | None
    place: str
    other: Reading | None = None


Reading = Listed | Literal | Placed


def lists(reading: Reading | None) -> tuple[str, ...]:
    """The phrases that the language model is asked about."""
    match reading:
        case Listed(phrase):
            return (phrase,)
        case Placed(what, _, other):
            return (*lists(what), *lists(other))
    return ()


def read(phrase: str, language: Language) -> Reading:
    """What a phrase says: `Listed`, with the phrase as it is, where it is neither literal nor has a place."""
    if len(phrase) > LONGEST:
        return Listed(phrase)
    text = _COMMA_INSIDE.sub(r"\1,", phrase)
    quotes = list(_QUOTE.finditer(text))
    numbers = iter(range(len(quotes)))
    text = _QUOTE.sub(lambda _: f'"{next(numbers)}"', text)
    for pattern, wording in _REWORDED:
        text = pattern.sub(wording, text)
    parser = _Parser(language, [found[0] for found in quotes], [found[found.lastindex or 0] for found in quotes])
    return parser.read(text) or Listed(phrase)


# Names of what is literal. They are looked up in the plural.
SIGNS: Mapping[str, str] = {
    **{"question marks": "?", "exclamation marks": "!", "exclamation points": "!", "colons": ":", "semicolons": ";"},
    **{"hyphens": "-", "underscores": "_", "asterisks": "*", "ampersands": "&", "backslashes": "\\", "tildes": "~"},
    **{"equals signs": "=", "equal signs": "=", "plus signs": "+", "minus signs": "-", "percent signs": "%"},
    **{"dollar signs": "$", "pound signs": "£", "euro signs": "€", "at signs": "@", "hash signs": "#", "hashes": "#"},
    **{"greater-than signs": ">", "less-than signs": "<", "vertical bars": "|", "pipes": "|", "bullet points": "•"},
    **{"parentheses": "()", "round brackets": "()", "square brackets": "[]", "curly brackets": "{}", "braces": "{}"},
    **{"angle brackets": "<>", "opening parentheses": "(", "closing parentheses": ")"},
}
"""Signs of which the language has no class."""
SAME: Mapping[str, str] = {
    **{"periods": "full stops", "quotes": "quotation marks", "speech marks": "quotation marks", "digits": "numbers"},
    **{"inverted commas": "quotation marks", "newlines": "line breaks", "newline characters": "line breaks"},
    **{"ellipses": "dots", "numerals": "numbers", "capitalized words": "capitalised words"},
    **{"punctuation marks": "punctuation", "punctuation signs": "punctuation"},
}
"""Other names of classes of the language."""
WORDS = ("words", "words with digits in them", "numbers", "short forms with an apostrophe")
"""The classes of the language that make up `words` next to a place: all that is no sign."""

# English. A quoted text stands in these patterns as its number, in quotation marks.
_QUOTE = re.compile(
    r'"([^"\n]+)"|“([^”\n]+)”|„([^“”\n]+)[“”]|«([^»\n]+)»|`([^`\n]+)`|‘(.+?)’(?!\w)|(?<!\w)\'(?=\S)(.+?)(?<=\S)\'(?!\w)'
)
_COMMA_INSIDE = re.compile(r"(?<=\w),([\"'”’])(?=\s)")
"""American lists: the words "he," "she," and "they"."""
_Q = r'"\d+"'
_THE = (
    "(?:(?:the|an?|any|all|every|each|both|some|single|first|next|exact|specific|"
    "(?:instance|occurrence|mention|use|reference)s? (?:of|to)) )*"
)
_NOUN = (
    "(?:word|token|term|name|noun|verb|adjective|adverb|pronoun|preposition|conjunction|article|determiner|participle|"
    "number|numeral|digit|letter|sign|symbol|mark|character|phrase|abbreviation|acronym|initial|suffix|prefix|ending)"
    "(?:e?s)?"
)
"""What texts are made of."""
_KIND_OF = (
    r"(?:(?!(?:no|non|not|of|in|for|with|without|about|like|than|to|from|on|by|as|except|after|before|\w+ing)\b)"
    r"[\w-]+ ){0,2}"
)
"""What may stand before such a noun: "past tense" before "verbs"."""
_ANY = "(?:(?:the|an?|any|every|each|new) )*"
_BETWEEN = (
    f"(?:inside|within|in|between|(?:enclosed|surrounded) (?:by|in)) {_ANY}(?:(?:round|square|curly|double|single) )?"
)
_REWORDED = tuple(
    (re.compile(pattern, re.I), wording)
    for pattern, wording in (
        (r"\s+", " "),
        (rf"\b{_BETWEEN}(?:brackets|parenthes[ie]s)\b", "inside brackets"),
        (rf"\b{_BETWEEN}(?:quotation marks|quotes|speech marks|inverted commas)\b", "inside quotation marks"),
        (rf"\b(?:at|in) the (?:very )?(?:start|beginning) of {_ANY}(line|sentence)s?\b", r"at the start of a \1"),
        (
            rf"\b(?:at|in) the (?:very )?(?:start|beginning) of {_ANY}(?:text|document)s?\b",
            "at the beginning of a text",
        ),
        (rf"\bfirst (words?|tokens?) (?:of|in) {_ANY}(line|sentence)s?\b", r"\1 at the start of a \2"),
        (r"\b(?:following|(?:that|which) follows?|preceded by)\b", "after"),
        (r"\b(?:preceding|(?:that|which) precedes?|followed by)\b", "before"),
        (
            r"(?: (?:that|which)|,? (?:when|where|if)(?: it| they)?)?"
            r"(?: (?:is|are|comes?|coming|appears?|appearing|occurs?|occurring|stands?|standing))?"
            r"(?: (?:right|just|directly|immediately|only))? "
            r"(?=(?:after|before|among|inside|at the (?:start|beginning))\b)",
            " ",
        ),
    )
)
"""Ways to say a place, and how the language says it."""
_AND = re.compile(r"\s*,\s*(?:(?:and|or)\s+)?|\s+(?:and/or|and|or|as well as)\s+", re.I)
_ITEM = re.compile(rf"{_THE}(?P<noun>{_KIND_OF}{_NOUN} )?(?P<quote>{_Q})", re.I)
_AFFIX = rf"(?:{_Q}|[-‐‑–]\w+|\w+[-‐‑–]|\w\b)"
_AFFIXED = re.compile(
    rf"{_THE}{_KIND_OF}{_NOUN} (?:(?:that|which) )?(?:(?P<ending>end)(?:s|ing)?|begin(?:s|ning)?|start(?:s|ing)?) "
    r"(?:in|with) (?:the )?(?:(?:letter|suffix|prefix|ending)(?:e?s)? )?"
    rf"({_AFFIX}(?:(?:,| and| or|, and|, or) {_AFFIX})*)",
    re.I,
)
_ALL = re.compile(rf"{_THE}(?:tokens?|text|anything|everything|what)?", re.I)
_KIND = re.compile(rf"{_THE}{_KIND_OF}{_NOUN}\b", re.I)
_SPOKEN_OF = re.compile(r"(?:^|\W)(?:and|or|as|like|including|the|an?|e\.g\.?)$|[:;(]$", re.I)
_UNSURE = re.compile(
    r"\b(?:not|never|cannot|\w+n['’]t|without|except|unless|than|rarely|seldom|hardly|"
    r"especially|particularly|often|usually|sometimes|mostly|mainly|typically|commonly)$",
    re.I,
)
"""Before a place: X is meant elsewhere, or there and elsewhere."""
_SAYING = re.compile(r"(?:and|or|in|of|to|which|that|each other|one|them|it|all\W*$)\b|[,.:;)]|\W*$", re.I)
"""Before the one and behind the other, "after" is a word that is spoken of, or part of a saying."""


@dataclass(frozen=True)
class _Parser:
    """Reads one phrase, in which quoted texts are numbers: `spans` are with their marks, `quoted` without."""

    language: Language
    spans: Sequence[str]
    quoted: Sequence[str]

    def read(self, text: str) -> Literal | Placed | None:
        """What is literal or at a place; None for what is neither."""
        text = text.strip(" .,;:")
        return self._literal(text) or self._placed(text)

    def _part(self, text: str) -> Reading | None:
        """What stands at or next to a place; None for any token."""
        if _ALL.fullmatch(text):
            return None
        if re.fullmatch(rf"{_THE}(?:words?|terms?)", text, re.I):
            return Literal(tuple(What("class", name) for name in WORDS))
        return self.read(text) or Listed(re.sub(_Q, lambda found: self.spans[int(found[0][1:-1])], text))

    def _placed(self, text: str) -> Placed | None:
        """At the first place in the text that can be the place of what stands before it."""
        places = sorted((*self.language.places, BEFORE), key=len, reverse=True)
        for found in re.finditer(rf"(?<![\w-])(?:{'|'.join(places)})(?![\w-])", text, re.I):
            x, y, place = text[: found.start()].strip(" ,"), text[found.end() :].strip(" ,"), found[0].lower()
            kind = self.language.places.get(place)
            if _SPOKEN_OF.search(x) or _UNSURE.search(x):
                continue
            if place != BEFORE and not isinstance(kind, Back | Among):
                if not y:
                    return Placed(self._part(x), place)
            elif not _SAYING.match(y) and (self._is_kind(y) or (self._is_bare(x) and not isinstance(kind, Among))):
                return Placed(self._part(x), place, self._part(y))
        return None

    def _is_bare(self, text: str) -> bool:
        """Whether a text names a kind of word and no more, so that a place behind it is that of the word."""
        return bool(_ALL.fullmatch(text) or _KIND.fullmatch(text) or self._literal(text))

    def _is_kind(self, text: str) -> bool:
        return bool(_KIND.match(text) or self._literal(text))

    def _literal(self, text: str) -> Literal | None:
        if whats := self._named(text) or self._affixes(text):
            return Literal(whats)
        items = [self._item(part) for part in _AND.split(text)]
        return Literal(tuple(what for item in items for what in item)) if all(items) else None

    def _named(self, text: str) -> tuple[What, ...]:
        """The signs, or the class of words that look alike, that a text is the name of."""
        whole = text.lower()
        name = re.sub(f"^{_THE}", "", whole)
        for plural in (whole, name, f"{name}s", f"{name}es", re.sub("is$", "es", name)):
            if plural in SIGNS:
                return tuple(What("word", sign) for sign in SIGNS[plural])
            if (found := SAME.get(plural, plural)) in self.language.spellings or found in self.language.shapes:
                return (What("class", found),)
        return ()

    def _item(self, text: str) -> tuple[What, ...]:
        """A quoted text or the name of signs."""
        if not (found := _ITEM.fullmatch(text)):
            return self._named(text)
        noun = (found["noun"] or "").lower()
        kind: Kind = "ending" if re.search("suffix|ending", noun) else "beginning" if "prefix" in noun else "word"
        return self._quoted(found["quote"], kind)

    def _affixes(self, text: str) -> tuple[What, ...]:
        if not (found := _AFFIXED.fullmatch(text)):
            return ()
        kind: Kind = "ending" if found["ending"] else "beginning"
        items = re.findall(_AFFIX, re.sub(r"\b(?:and|or) ", "", found[found.lastindex or 0], flags=re.I))
        return tuple(what for item in items for what in self._quoted(item, kind))

    def _quoted(self, item: str, kind: Kind) -> tuple[What, ...]:
        """The word, ending or beginning that is quoted; "-ing" is an ending by itself, and "un-" a beginning."""
        text = self.quoted[int(item[1:-1])] if re.fullmatch(_Q, item) else item
        text = " ".join(text.lower().split())
        bare = text.strip("-‐‑–")
        if bare.isalpha() and bare != text:
            kind = "ending" if text.endswith(bare) else "beginning"
        return (What(kind, text if kind == "word" else bare),) if text and (bare or kind == "word") else ()
