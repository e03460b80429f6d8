"""How tokens, words and windows are shown to a language model."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

LEVELS = 10
MIN_LEVEL = 4
"""Tokens at this level or above are shown to the explainer."""
MAX_WORDS = 8
UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Shown:
    """A window as it is shown to the explainer: token strings and `activations` (w,)."""

    tokens: list[str]
    activations: np.ndarray


@dataclass(frozen=True, eq=False)
class Marked:
    """A window as it is shown to a judge: token strings, which of them are `marked`, and whether it is `active`."""

    tokens: list[str]
    marked: Bool[np.ndarray, " w"]
    active: bool


def levels(activations: Float[np.ndarray, " w"], maximum: float) -> Int[np.ndarray, " w"]:
    """Activations as whole numbers 0..10: floor(10 max(a, 0) / maximum), at most 10 (paper section 4)."""
    if maximum <= 0:
        return np.zeros(len(activations), dtype=np.int64)
    scaled = np.floor(LEVELS * np.maximum(activations.astype(np.float64), 0) / maximum)
    return np.minimum(scaled, LEVELS).astype(np.int64)


def display(token: str) -> str:
    """A token on one line of a prompt: line breaks, tabs and backslashes as escapes."""
    return token.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def whole_word(tokens: Sequence[str], place: int) -> str:
    """The word that `tokens[place]` is part of; the token itself when it is no part of a word."""
    first = last = place
    while first > 0 and _together(tokens[first - 1][-1:], tokens[first][:1]):
        first -= 1
    while last + 1 < len(tokens) and _together(tokens[last][-1:], tokens[last + 1][:1]):
        last += 1
    return "".join(tokens[first : last + 1])


def _together(before: str, after: str) -> bool:
    """Are these two characters of one word? Vowel signs and accents of their own belong to what they stand on."""
    if before == "\u200d":  # joins what is around it, as in emoji
        return bool(after) and not after.isspace()
    if _is_mark(after):
        return bool(before) and not before.isspace()
    return (before.isalnum() or _is_mark(before)) and after.isalnum()


def _is_mark(character: str) -> bool:
    """Combining marks, joiners, and the colours of emoji."""
    if not character or character.isascii():
        return False
    coloured = "\U0001f3fb" <= character <= "\U0001f3ff"
    return coloured or character in "\u200c\u200d" or unicodedata.category(character).startswith("M")


def strongest_words(windows: Sequence[tuple[Sequence[str], Int[np.ndarray, " _"]]]) -> list[str]:
    """At most 8 different words, the strongest first, out of (token strings, levels) of the windows explained from."""
    found = [
        (-int(level[place]), whole_word(tokens, int(place)))
        for tokens, level in windows
        for place in np.flatnonzero(level >= MIN_LEVEL)
    ]
    words: dict[str, str] = {}
    for _, word in sorted(found, key=lambda item: item[0]):
        shown = word.strip(" ") and display(word.strip(" "))
        if shown and UNREADABLE not in shown:
            words.setdefault(shown.lower(), shown)
    return list(words.values())[:MAX_WORDS]


def mark(tokens: Sequence[str], marked: Bool[np.ndarray, " w"]) -> str:
    """Text on one line with << and >> around marked tokens, the spaces around a token left outside."""
    shown = []
    for token, chosen in zip(map(display, tokens), marked, strict=True):
        word = token.strip(" ")
        before, _, after = token.partition(word) if word else (token, "", "")
        shown.append(f"{before}<<{word}>>{after}" if chosen else token)
    return "".join(shown).strip(" ")
