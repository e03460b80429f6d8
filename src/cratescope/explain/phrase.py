"""The phrase in an explainer's answer, without what chat models put around it."""

from __future__ import annotations

import re

from cratescope.llm.reasoning import phrase, without_controls

_CUE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely)\b[!,.:]?\s*)?"
    r"(?:(?:the |this |a )?(?:detector|neuron)(?: \d+)? (?:finds|looks for|fires (?:on|for)|detects|responds to)"
    r"(?:\s*:\s*|\s+)|"
    r"explanation of neuron \d+ behaviou?r\s*:\s*|the main thing this neuron does is find(?:\s*:\s*|\s+)|"
    r"(?:the )?(?:final )?(?:answer|explanation|continuation|output|response)(?: is)?\s*:\s*|"
    r"here(?:['’]s| is) (?:the|a|my) [^:]{1,60}:\s+)",
    re.IGNORECASE,
)
"""What a model repeats of the prompt, or says first, on the line of the answer."""


# A sign that is spoken of ("- and --", "# signs") is no bullet and no heading.
_BULLET = re.compile(
    r"^(?:[-*•>]|#{1,6}|\d\d?[.)])\s+(?=[\w\"'*`“])(?!(?:and|or|in|as|at|before|after|between|signs?|symbols?|characters?)\b)"
)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}
_BOLD = re.compile(r"(\*\*|\*)(?=[^\s*])([^*]*[^\s*])\1(?=$|[\s.,;:!?)\"'])")


def clean_answer(text: str) -> str:
    """The explanation in an LLM's answer: its first line, without reasoning, marks around it or a full stop behind it.

    Marks are quotes, Markdown's emphasis, bullets and headings, and a repetition of the prompt's last words.
    """
    line, before = without_controls(phrase(text, "\n")).strip(), ""
    while line != before:
        before, line = line, _bare(line)
    line = line if line in {".", ""} else line.removesuffix(".")
    return _bare(line)


def _bare(line: str) -> str:
    """A line with one kind of mark less."""
    line = _emphasised(_BULLET.sub("", line))
    if found := _CUE.match(line):
        line = line[found.end() :]
    stopped = line.endswith(".") and len(line) > 1
    inner = line[:-1] if stopped else line
    return _unquoted(inner) if _unquoted(inner) != inner else line


def _emphasised(line: str) -> str:
    """Without ** and * around words; __ and _ only around the whole, as names have them too."""
    if (found := re.fullmatch(r"(__|_)(?=\S)(.*\s.*)(?<=\S)\1(\.?)", line)) and found[1] not in found[2]:
        line = found[2] + found[3]
    return re.sub(rf"(?:(?<=^)|(?<=[\s(\"']))(?:{_BOLD.pattern})", r"\2", line)


def _unquoted(line: str) -> str:
    """Without the quotes around it; two quoted words have none around them both."""
    closes = _QUOTES.get(line[:1])
    if len(line) < 2 or line[-1:] != closes:
        return line
    inner = line[1:-1]
    first = inner.find(closes)
    closed = first > 0 and not inner[first - 1].isspace() and not inner[first + 1 : first + 2].isalnum()
    return line if closed else inner.strip()
