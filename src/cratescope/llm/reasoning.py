"""A model's answer without its reasoning and the markup around it."""

from __future__ import annotations

import re

# Models write their reasoning between marks of their own. A mark in quotes is one that is spoken of.
_NAMES = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|rationale|scratchpad|chain[_-]of[_-]thought)"
_OPENINGS = (
    rf"<{_NAMES}(?:\s[^<>]*)?>",
    rf"\[{_NAMES}\]",
    r"◁think▷",
    r"(?:<\|start\|>\s*assistant\s*)?<\|channel\|?>\s*(?:analysis|commentary|thought)\b(?:[^<\n]*<\|message\|>)?",
    r"<\|(?:START_THINKING|begin_of_thought|thinking)\|>",
    r"<unused94>",
    r"(?-i:\A\s*analysis(?=[A-Z]))",  # the marks of a channel, left out by a server
    r"here(?:['’]s| is) my (?:thought|reasoning) process:",
    r"<details\b[^<>]*\breasoning\b[^<>]*>",
    r"<(?:analysis|reflection|reason)>",
)
_CLOSINGS = (
    rf"</{_NAMES}\s*>",
    rf"\[/{_NAMES}\]",
    r"◁/think▷",
    r"(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*final\b[^<\n]*<\|message\|>",
    r"<channel\|>",
    r"<\|(?:END_THINKING|end_of_thought|/thinking)\|>",
    r"<unused95>",
)
# What closes only where it was opened: any text may hold it.
_OWN_CLOSINGS = (r"assistantfinal(?:\s*:)?", r"here is my response:", r"</(?:details|analysis|reflection|reason)>")


def _unquoted(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the marks that has not a quote on either side."""
    mark = f"(?:{'|'.join(marks)})"
    return re.compile(rf"(?<![\"'`“‘«]){mark}|{mark}(?![\"'`”’»])", re.IGNORECASE)


_OPENING = _unquoted(_OPENINGS)
_CLOSING = _unquoted(_CLOSINGS)
_ANY_CLOSING = _unquoted(_CLOSINGS + _OWN_CLOSINGS)
_WRAPPED = re.compile(
    r"\s*(?:<\|(?:START_RESPONSE|begin_of_solution)\|>|<(answer|final[_-]?answer|response|output|solution)>)",
    re.IGNORECASE,
)
# The end of a turn directly follows the text; after a space or a quote it is only mentioned.
_END = re.compile(
    r"(?<![\s\"'`“‘«(])(?:<\|(?:end|return|call|im_end|eot_id|eom_id|endoftext|end_of_text|end_of_solution|"
    r"END_RESPONSE|END_OF_TURN_TOKEN)\|>"
    r"|<end_of_turn>|</s>|<turn\|>|<｜end▁of▁sentence｜>)"
)
# Escape sequences begin with them; the others turn the text around or are not seen at all.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff]+")
_LABELLED = re.compile(
    r"\A[\s*_#]*(?:reasoning|thinking|thoughts?|thought process|analysis|rationale)[*_ ]*:.*?"
    r"^[\s*_#]*(?:final )?(?:answer|explanation|continuation|output)[*_ ]*:[\s*_]*",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)


def without_reasoning(text: str) -> str:
    """The answer after, or before, the reasoning; empty if the reasoning never ends.

    An end mark may lack its start, which some chat templates put into the prompt.
    """
    text = _LABELLED.sub("", text, 1)
    opened = [found for found in _OPENING.finditer(text) if _is_mark(found, text)]
    begins = bool(opened) and not text[: opened[0].start()].strip()
    closed = list((_ANY_CLOSING if begins else _CLOSING).finditer(text))
    if closed:
        tail = text[closed[-1].end() :]
        again = next((found.start() for found in _OPENING.finditer(tail)), len(tail))
        if tail[:again].strip():
            return _unwrapped(tail[:again])
        first = next(_OPENING.finditer(text), None)
        return _unwrapped(text[: first.start()]) if first else ""
    if opened:
        wrapped = re.search(r"^\s*<(?:final[_-]?)?answer>", text[opened[0].end() :], re.MULTILINE | re.IGNORECASE)
        if wrapped:
            return _unwrapped(text[opened[0].end() + wrapped.start() :])
        return _unwrapped(text[: opened[0].start()])
    return _unwrapped(text)


def _is_mark(found: re.Match[str], text: str) -> bool:
    """Whether the mark begins a line; in the middle of a line it is only mentioned."""
    return not text[: found.start()].rpartition("\n")[2].strip()


def _unwrapped(text: str) -> str:
    """The answer without enclosing marks and end-of-turn marks."""
    wrapped = _WRAPPED.match(text)
    if wrapped:
        text = text[wrapped.end() :]
        text = re.split(rf"</{wrapped[1]}\s*>", text, flags=re.IGNORECASE)[0] if wrapped[1] else text
    ended = _END.search(text)
    return text[: ended.start()] if ended else text


_ANNOUNCES = re.compile(
    r"\W*(?:(?:sure|certainly|of course|okay|absolutely)\b[^\n]{0,80}[:!]|here(?:['’]s| is| are)\b[^\n]{0,80}:|"
    r"(?:the )?(?:continuation|answer|explanation|output|response|detector finds)(?: is)?\W*:)\W*|"
    r"```\w*|(?-i:Words: .*)",
    re.IGNORECASE,
)


def phrase(text: str, stop: str) -> str:
    """The first piece of an answer, up to `stop`, that is neither blank nor an announcement of what follows."""
    pieces = [piece for piece in without_reasoning(text).split(stop) if piece.strip()]
    for piece in pieces[:-1]:
        if not _ANNOUNCES.fullmatch(piece.strip()):
            return piece
    return pieces[-1] if pieces else ""


def without_controls(text: str) -> str:
    """`text` with a space for characters that steer a terminal or are not seen."""
    return _CONTROLS.sub(" ", text)
