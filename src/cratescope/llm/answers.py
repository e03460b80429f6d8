"""Parsing of a server's answers: text without reasoning, reasons for its absence, log-probabilities, errors.

Servers that call themselves OpenAI-compatible differ in all of these, and so do their models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cratescope.errors import UserError
from cratescope.files import SURROGATES
from cratescope.llm.interface import NoAnswer
from cratescope.llm.reasoning import without_controls, without_reasoning

EMPTY_ANSWER = "empty answer"
ONLY_REASONING = "reasoning without an answer"
REFUSED = "refused by the server: "
WORDS_SHOWN = 200
"""Characters shown of what a server says."""
BY_ID = "return_tokens_as_token_ids"
"""vLLM's option to name tokens by their ids, so that none is taken for another; stricter servers refuse to know it."""
SYSTEM = "system role"
"""Not an option by name, but refused as one: some models know no system message."""

_REFUSAL = re.compile(
    r"(?:(?:i['’]?m|i am) (?:very |so |really )?sorry\b|sorry, (?:but )?i\b|i apologi[sz]e\b|as an ai\b|"
    r"i (?:can(?:not|['’]t)|am (?:not able|unable) to|won['’]t|['’]m (?:not able|unable) to) "
    r"(?:help|assist|comply|continue|fulfil|provide|do that|answer|discuss|engage|create|generate)\b)",
    re.IGNORECASE,
)
_LENGTH = {"length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length"}
_FILTERED = {
    *("content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii"),
    *("sensitive", "guardrail_intervened", "moderation"),
}
MORE_TOKENS = "give it more room with --llm-max-tokens (reasoning wants 2000), or take a model without reasoning"
OTHER_MODEL = "take another model with --llm-model"
Read = Callable[[Any], Any]


def parsed(text: str) -> Any:
    """Parse the JSON of an answer, even after a byte-order mark or as server-sent events.

    Raises:
        ValueError, RecursionError: it is something else.
    """
    text = re.sub(r"\A(?::.*|\s)+", "", text.lstrip("\ufeff")).strip()  # less comments that keep a line open
    if re.match(r"(?:data|event|id|retry)?:", text):
        lines = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("data:")]
        return _joined([json.loads(line) for line in lines if line not in ("", "[DONE]")])
    return json.loads(text)


def _joined(events: Sequence[Any]) -> Any:
    """Join the pieces of a stream into one answer; an error among them becomes the answer."""
    failed = [event for event in events if not isinstance(event, dict) or event.get("error")]
    pieces = [event["choices"][0] for event in events if isinstance(event, dict) and event.get("choices")]
    if failed or len(pieces) < 2:
        return (failed or [event for event in events if event.get("choices")] or events or [{}])[0]
    messages = [piece.get("message") or piece.get("delta") or {} for piece in pieces]
    contents = [message.get("content") for message in messages]
    whole = {key: value for piece in pieces for key, value in piece.items() if value is not None}
    whole["message"] = {key: value for message in messages for key, value in message.items() if value is not None}
    whole["message"]["content"] = "".join(one for one in contents if isinstance(one, str))
    if "text" in whole:
        whole["text"] = "".join(piece.get("text") or "" for piece in pieces)
    return {"choices": [whole]}


_NAMED = (
    ("auth|api_key|permission", 401),
    ("not_found", 404),
    ("rate_limit|quota", 429),
    ("invalid_request|unsupported|content_|context_length|extra_forbidden", 400),
)
"""Names of errors and their statuses, for a server that reports errors with status 200."""


def error_status(answer: Any) -> int | None:
    """Status that an answer of status 200 should have had if it contains an error; 500 if it does not say."""
    if not isinstance(answer, dict):
        return None
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    told = first.get("error") if isinstance(first, dict) and first.get("error") else answer.get("error")
    said = answer.get("object") == "error" or any(answer.get(name) for name in ("detail", "errors", "message"))
    if not told and (choices or not said):
        return None
    codes = [told.get(name) for name in ("code", "status", "type")] if isinstance(told, dict) else []
    codes += [answer.get(name) for name in ("code", "status", "type")]
    for code in codes:
        if str(code).isascii() and str(code).isdigit() and 400 <= int(str(code)[:9]) <= 599:
            return int(str(code))
    named = " ".join(str(code).lower() for code in codes)
    return next((status for pattern, status in _NAMED if re.search(pattern, named)), 500)


_SAYS = (
    *("error", "errors", "message", "msg", "detail", "details", "description", "error_description", "reason"),
    *("error_message", "errorMessage", "title", "metadata", "raw", "choices"),
)
"""Names under which servers put messages."""


def words(text: str) -> str:
    """A server's message on one line: those of an error in any of the usual shapes, or the text itself."""
    said = without_controls(SURROGATES.sub("\ufffd", _said(text)))
    return " ".join(said.split())[:WORDS_SHOWN].strip()


def _said(text: str) -> str:
    try:
        answer = parsed(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if re.search(r"<(?:html|!doctype|head|body)\b", text, re.IGNORECASE):
            return re.sub(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
        return text
    return "; ".join(dict.fromkeys(phrase for phrase, _ in _phrases(answer) if phrase.strip())) or text


def _phrases(value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Messages of an error, each with the option it concerns if the server names it."""
    if depth > 8:
        return
    if isinstance(value, str):
        inner = _container(value)
        yield from _phrases(inner, depth + 1) if inner is not None else [(value, "")]
    elif isinstance(value, list):
        for item in value:
            yield from _phrases(item, depth + 1)
    elif isinstance(value, dict):
        where = value.get("loc", value.get("param"))
        about = ".".join(map(str, where)) if isinstance(where, list) else str(where or "")
        last, code = about.rpartition(".")[2], value.get("code")
        for name in _SAYS:
            for phrase, inner_about in _phrases(value[name], depth + 1) if value.get(name) else ():
                said = f"{last}: {phrase}" if last and last not in phrase else phrase
                yield said + (f" ({code})" if isinstance(code, str) and code not in said else ""), inner_about or about


def _container(text: str) -> Any:
    """Parse an object or list inside a string, the way servers forward the errors of others."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if any(True for _ in _phrases(found)) else None


_COMPLAINT = re.compile(
    r"support|recogni[sz]|unknown|unexpected|extra\b|permitted|allow|available|implement|invalid|forbidden|deprecated|"
    r"\bonly\b|can(?:no|['’])t|no such|must|should|disallow|refus|accept|exceed|greater|larger|at most|not valid",
    re.IGNORECASE,
)
PROMPT = re.compile(
    r"content[ _-]?(?:filter|policy|management|exists risk|moderation)|responsible.?ai|flagged|moderation|"
    r"inappropriate|safety|prohibited|filtered|usage policies|data.?inspection|sensitive|"
    r"context.{0,3}(?:length|window|size)|(?:prompt|input|request|text).{0,20}too (?:long|large)|too many tokens|"
    r"maximum (?:context|number of tokens|input|prompt)|exceeds? the .{0,20}(?:context|length|tokens)",
    re.IGNORECASE,
)
"""A refusal of what is asked and not of how."""
QUOTA = re.compile(
    r"insufficient[ _](?:quota|balance|credit|funds)|exceeded your current quota|(?:credit|quota|balance).{0,20}"
    r"(?:exhausted|used up|depleted|too low)|billing|payment required|out of credits|no credits",
    re.IGNORECASE,
)
_PLAIN = {"stop", "seed", "echo", "temperature"}
"""Options whose names are words that any sentence may hold."""
_SYSTEM = re.compile(
    r"\bsystem\b.{0,30}\b(?:role|message|prompt|instruction)|\broles?\b.{0,60}\bsystem\b|roles must alternate|"
    r"developer instruction",
    re.IGNORECASE,
)


def refused_option(text: str, sent: Mapping[str, Any]) -> str | None:
    """The first of the options in `sent` that an error concerns."""
    try:
        said = list(_phrases(parsed(text)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = []
    names = [name for name in sent if name not in ("model", "messages", "prompt", "places")]
    for phrase, about in said or [(text, "")]:
        # pydantic repeats the whole request as `input`
        phrase = re.split(r"['\"]input['\"]\s*:", phrase)[0]
        parts = about.split(".")
        if {"prompt", "model"} & {*parts} or PROMPT.search(phrase):
            continue
        if told := [part for part in parts if part in names]:
            return told[0]
        if "messages" in sent and sent["messages"][0]["role"] == "system" and _SYSTEM.search(phrase):
            return SYSTEM
        found = [(place, name) for name in names if (place := _named_at(name, phrase)) is not None]
        if found:
            return min(found)[1]
    return None


def _named_at(name: str, phrase: str) -> int | None:
    """Position at which a phrase names an option."""
    found = re.search(rf"(?<![\w-]){name}(?!\w)", phrase)
    quoted = re.search(rf"['\"`]{name}['\"`]", phrase)
    if name in _PLAIN and not quoted and not _COMPLAINT.search(phrase):
        return None
    return found.start() if found else None


def text_of(chat: bool, limit: int | None) -> Read:
    """Read the text of a completion, or the reason why there is none.

    A missing text without a reason raises TypeError or LookupError, because a retry may return it.
    """

    def read(answer: Any) -> str | NoAnswer:
        choice = answer["choices"][0]
        message = choice.get("message") or {}
        places = [(message, "content"), (choice, "text")] if chat else [(choice, "text"), (message, "content")]
        told = [place[name] for place, name in places if name in place]
        content, finish = told[0] if told else None, choice.get("finish_reason")
        refusal = message.get("refusal") if chat or not content else None
        refusal = refusal or _refusal_part(content)
        if content is None and not finish and not refusal and not (chat and told):
            raise TypeError("no text in it")
        reasoned = bool(message.get("reasoning_content") or message.get("reasoning"))
        return _usable(_plain_text(content), finish, refusal, limit, reasoned)

    return read


def _usable(text: str, finish: Any, refusal: Any, limit: int | None, reasoned: bool) -> str | NoAnswer:
    ended = str(finish or "").lower()
    said = without_reasoning(text).strip()
    if ended in _FILTERED:
        return NoAnswer(f"content filter (finish_reason {finish})", OTHER_MODEL)
    if refusal or ended == "refusal" or _REFUSAL.match(said):
        told = words(refusal if isinstance(refusal, str) else said)
        return NoAnswer(f"refusal: {told}" if told else "refusal", OTHER_MODEL)
    if said:
        return text
    if ended in _LENGTH:
        within = f"within {limit} tokens" if limit else "within the server's limit of tokens"
        spent = ", which reasoning spent" if reasoned or text.strip() else ""
        return NoAnswer(f"no answer {within}{spent} (finish_reason {finish})", MORE_TOKENS)
    if text.strip():
        return NoAnswer(ONLY_REASONING, f"{MORE_TOKENS}, or ask with --llm-chat")
    other = "" if ended in ("", "stop", "eos", "end_turn", "eos_token") else f" (finish_reason {finish})"
    return NoAnswer(EMPTY_ANSWER + other, "raise --llm-max-tokens, try with or without --llm-chat, or another model")


def _plain_text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts, some of them reasoning."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise TypeError("no text in it")
    return "".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part["text"]
    text = text["value"] if isinstance(text, dict) else text
    if not isinstance(text, str):
        raise TypeError("no text in it")
    return text


def _refusal_part(content: Any) -> Any:
    parts = content if isinstance(content, list) else []
    return next((part["refusal"] for part in parts if isinstance(part, dict) and part.get("refusal")), None)


def tops_at(places: Sequence[int], n: int, url: str) -> Read:
    """Read the likeliest tokens at `places` of an answer with `n` of them; a single one is the first of any."""

    def read(answer: Any) -> list[dict[str, float]]:
        told = answer["choices"][0].get("logprobs")
        if not told:
            raise UserError(f"{url}: the server gives no log-probabilities; it can explain, and not simulate")
        if "content" in told:  # llama.cpp answers like a chat
            told = {"top_logprobs": [_by_name(token["top_logprobs"]) for token in told["content"]]}
        tops = told["top_logprobs"]
        if len(tops) == 1 < n:
            raise UserError(
                f"{url}: the server gives no log-probabilities of the prompt itself (echo), which all-at-once needs; "
                "vLLM does; or run the model here (--llm HUB_NAME or FOLDER)"
            )
        if n == 1 and tops:  # a server that ignores the limit keeps writing
            return [{str(token): _logprob(value) for token, value in tops[0].items()}]
        if len(tops) != n:
            raise ValueError(f"log-probabilities of {len(tops)} tokens instead of {n}")
        return [{str(token): _logprob(value) for token, value in tops[place].items()} for place in places]

    return read


def _by_name(tokens: Any) -> dict[str, float]:
    return {f"token_id:{token['id']}" if "id" in token else token["token"]: token["logprob"] for token in tokens}


def _logprob(value: Any) -> float:
    if not (isinstance(value, (int, float)) and value <= 1e-3):
        raise ValueError(f"{value} is not a log-probability")
    return float(value)
