"""A language model on an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, or a hosted one."""

from __future__ import annotations

import email.utils
import functools
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError, as_user_error, first_line
from cratescope.files import SURROGATES
from cratescope.llm.answers import (
    BY_ID,
    PROMPT,
    QUOTA,
    REFUSED,
    SYSTEM,
    Read,
    error_status,
    parsed,
    refused_option,
    text_of,
    tops_at,
    words,
)
from cratescope.llm.cache import AnswerCache
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import Choices, Ids, NoAnswer, RefusedError, check_slots, encode, heads, spelled
from cratescope.llm.reasoning import phrase, without_reasoning
from cratescope.progress import say
from cratescope.text.offline import cache
from cratescope.text.tokenizer import named_tokenizer, token_strings

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
"""Seconds before the second try, doubled for every further one; and at most, whatever the server asks for."""
TOP = 20
"""Likeliest tokens asked for at a place: as many as vLLM gives unless told otherwise."""
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, *range(520, 525), 527, 529, 530}
"""Statuses after which the same request may succeed; those from 520 on are of services that stand before a server."""
REFUSALS = {400, 413, 422, 451}
"""Statuses that refuse this request, while another may be answered."""
LOGPROBS: tuple[dict[str, Any], ...] = (
    {"logprobs": TOP},
    {"logprobs": 5},
    {"logprobs": True, "top_logprobs": TOP},
    {"logprobs": True, "top_logprobs": 5},
)
"""Ways to ask for the likeliest tokens; the next one for a server that refuses one."""
CONTINUE = "Continue the user's text. Write only what comes next, without repeating any of it, on one line."
SPACES = ("\u2581", "\u0120")
"""Signs for a space in the pieces of SentencePiece's and GPT-2's vocabularies."""


class _StoppedError(Exception):
    """Raised after another request has failed; that request's reason is the one to report."""


class ServerLLM:
    """Client of a server with concurrent requests; every answer is cached on disk and never requested again.

    Without a tokenizer an "id" is a character, which is all that explanations need. With the model's own (given by
    name) ids are the model's, and log-probabilities at places of a prompt can be asked for.
    """

    dtype = "served"

    def __init__(self, config: LLMConfig, answers: AnswerCache, tokenizer: Any = None) -> None:
        self.name = config.llm_model
        self._config, self._answers, self._tokenizer = config, answers, tokenizer
        self._url = config.llm.rstrip("/")
        self._key = os.environ.get(config.llm_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"${config.llm_key_env}: not a key (it holds characters that no header can); set it again")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(headers=headers, timeout=config.llm_timeout)
        self._turn, self._next, self._stop = threading.Lock(), 0.0, threading.Event()
        self._refused: set[str] = set()  # options that this server has refused
        self._logprobs = 0  # index into LOGPROBS of the value to send

    @classmethod
    def open(cls, config: LLMConfig) -> ServerLLM:
        """Prepare the client, without a request. UserError: no model named, a bad address, or no such tokenizer."""
        fix = "write it like http://HOST:PORT/v1"
        try:
            address = urlsplit(config.llm)
            named = address.hostname and address.port != 0  # reading the port checks it
        except ValueError as error:
            raise UserError(f"--llm {config.llm}: not an address ({error}); {fix}") from error
        if not named:
            raise UserError(f"--llm {config.llm}: names no host and port; {fix}")
        if address.username or address.password or address.query:
            raise UserError(f"--llm: a key does not belong in an address; put it into ${config.llm_key_env}")
        if not config.llm_model:
            raise UserError(f"--llm {config.llm}: name one of the server's models with --llm-model")
        tokenizer = None
        if config.llm_tokenizer:
            what, fix = f"--llm-tokenizer {config.llm_tokenizer}", "give the hub name or folder of the served model"
            with as_user_error(f"{what}: cannot load it", fix):
                tokenizer = named_tokenizer(config.llm_tokenizer)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would log every request
        return cls(config, AnswerCache(cache() / "answers.sqlite3"), tokenizer)

    def encode(self, text: str) -> list[int]:
        return [ord(sign) for sign in text] if self._tokenizer is None else encode(self._tokenizer, text)

    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str | NoAnswer]:
        asked = {"model": self.name, "max_tokens": max_new_tokens, "temperature": 0, "seed": 0}
        if self._config.llm_chat:
            system = {"role": "system", "content": CONTINUE}
            texts = [self._decode([*prefix, *prompt]) for prompt in prompts]
            bodies = [asked | {"messages": [system, {"role": "user", "content": text}]} for text in texts]
            path = "chat/completions"
        else:
            bodies = [asked | {"prompt": self._prompt([*prefix, *prompt]), "stop": [stop]} for prompt in prompts]
            path = "completions"
        answers = self._ask(path, bodies, [text_of(self._config.llm_chat, max_new_tokens)] * len(bodies))
        found, halves = [], 0
        for answer in answers:
            if isinstance(answer, str):
                text, lone = SURROGATES.subn("\ufffd", answer)
                halves += lone > 0
                answer = phrase(text, stop)
                answer = answer.lstrip() if self._config.llm_chat else answer
            found.append(answer)
        if halves:
            self._say(f"{halves} answers hold half a character (a lone surrogate); U+FFFD stands in its place")
        return found

    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        raise UserError(
            f"{self._url}: a server tells of the likeliest tokens only, and the list simulators and --reference-quirks "
            "need the whole vocabulary; use --simulator all-at-once, or run the model here (--llm HUB_NAME or FOLDER)"
        )

    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Choices
    ) -> list[Float[np.ndarray, "slots choices"]]:
        check_slots(prompts, slots)
        if self._tokenizer is None:
            raise UserError(
                f"{self._url}: log-probabilities in a prompt need the model's tokenizer; name it with --llm-tokenizer "
                "(hub name or folder)"
            )
        begun = heads(choices)
        asked: list[tuple[list[int], list[int]]] = []
        for prompt, row in zip(prompts, slots, strict=True):
            asked.append(([*prefix, *prompt[: max(row)]], [len(prefix) + slot for slot in row]))
            # Each continuation of a choice's first token is another prompt, one per slot.
            for head in begun[1:]:
                ids = [[*prefix, *prompt[:slot], *head] for slot in row]
                asked += [(one, [len(one)]) for one in ids]
        answers = iter(self._likeliest(asked))
        found = []
        for row in slots:
            tops = {begun[0]: next(answers)}
            for head in begun[1:]:
                tops[head] = [next(answers)[0] for _ in row]
            rows = [[self._logprob(tops, place, ids) for ids in spelled(choices)] for place in range(len(row))]
            found.append(np.array(rows))
        return found

    def _logprob(self, tops: dict[tuple[int, ...], list[dict[str, float]]], place: int, ids: tuple[int, ...]) -> float:
        """log P of a sequence; -inf if any of its tokens is not among the likeliest."""
        total = 0.0
        for step, token in enumerate(ids):
            top = tops[ids[:step]][place]
            names = self._names(token)
            # Where no text begins with a space, the server gives tokens as they are decoded by themselves.
            spaced = any(text.startswith((" ", *SPACES)) for text in top)
            known = [top[name] for name in (names if spaced else [*names, self._decode([token])]) if name in top]
            total += known[0] if known else -math.inf
        return total

    @functools.cache  # noqa: B019 (there is one of these in a process)
    def _names(self, token: int) -> list[str]:
        """Names that servers give a token: its id, its text between others, or its piece of the vocabulary."""
        tokenizer: Any = self._tokenizer
        text = token_strings(tokenizer, [token]) if isinstance(tokenizer, PreTrainedTokenizerFast) else []
        return [f"token_id:{token}", *text, *tokenizer.convert_ids_to_tokens([token])]

    def _likeliest(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[list[dict[str, float]]]:
        """The likeliest tokens and their log-probabilities at places of prompts, up to the place after the end."""
        bodies, reads = [], []
        for ids, places in asked:
            prompt = self._prompt(ids)
            places = [place + len(prompt) - len(ids) for place in places]
            echo = places != [len(prompt)]
            body = {"model": self.name, "prompt": prompt, "max_tokens": 1, "temperature": 0} | LOGPROBS[0]
            bodies.append(body | {BY_ID: True} | ({"echo": True, "places": places} if echo else {}))
            reads.append(tops_at(places if echo else [-1], len(prompt) + 1 if echo else 1, self._url))
        return self._ask("completions", bodies, reads, all_needed=True)

    def _prompt(self, ids: list[int]) -> str | list[int]:
        return self._decode(ids) if self._tokenizer is None else [*self._tokenizer("").input_ids[:1], *ids]

    def _decode(self, ids: Ids) -> str:
        return "".join(map(chr, ids)) if self._tokenizer is None else self._tokenizer.decode(ids)

    def _ask(
        self, path: str, bodies: Sequence[dict[str, Any]], reads: Sequence[Read], all_needed: bool = False
    ) -> list[Any]:
        """Apply `reads` to the answers, from disk where cached and else from the server, each stored immediately.

        Raises RefusedError when all prompts are refused, or one of them where `all_needed`.
        """
        requests = [{"url": self._url, "path": path, "body": body} for body in bodies]
        keys = [json.dumps(request, sort_keys=True) for request in requests]
        stored = dict(zip(keys, self._answers.find(requests), strict=True))
        # An older version also kept answers without a text.
        blank = {key for key, one in stored.items() if isinstance(one, str) and not without_reasoning(one).strip()}
        known = {key: one for key, one in stored.items() if one is not None and key not in blank}
        missing = {key: place for place, key in enumerate(keys) if key not in known}
        self._stop.clear()
        refusals: dict[str, RefusedError] = {}
        pool = ThreadPoolExecutor(self._config.llm_concurrency)
        try:
            work = ((key, requests[place], reads[place]) for key, place in missing.items())
            jobs = {pool.submit(self._answer, request, read, all_needed): key for key, request, read in work}
            for job in as_completed(jobs):
                try:
                    known[jobs[job]] = job.result()
                except _StoppedError:
                    continue  # the request that stopped it reports why
                except RefusedError as error:
                    if all_needed:
                        raise
                    refusals[jobs[job]] = error
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        if keys and len(refusals) == len({*keys}):
            first = refusals[keys[0]]
            raise RefusedError(str(first), [refusals[key].answers[0] for key in keys])
        return [known[key] if key in known else refusals[key].answers[0] for key in keys]

    def _answer(self, request: dict[str, Any], read: Read, all_needed: bool) -> Any:
        try:
            answer = self._post(f"{self._url}/{request['path']}", request["body"], read)
        except UserError as error:
            if all_needed or not isinstance(error, RefusedError):
                self._stop.set()  # the others would be wasted
            raise
        if not isinstance(answer, NoAnswer):  # a later attempt may have one
            self._answers.store(request, answer)
        return answer

    def _post(self, url: str, body: dict[str, Any], read: Read) -> Any:
        """Apply `read` to the server's answer; temporary failures are retried with exponential backoff."""
        problem, attempt = "", 0
        while attempt < TRIES:
            self._wait_for_turn()
            if self._stop.is_set():
                raise _StoppedError
            wait = FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
            sent = self._sent(body)
            text = ""
            try:
                status, retry_after, text = self._reply(url, sent)
                if 200 <= status < 300:
                    answer = parsed(text)
                    status = error_status(answer) or 200
                    if status == 200:
                        return read(answer)
                problem = f"status {status} ({self._words(text)})"
                if self._does_without(url, status, text, sent):
                    continue
                self._check_refusal(url, status, text, problem, retry_after)
                wait = retry_after or wait
            except httpx2.InvalidURL as error:
                raise UserError(f"{url}: not an address ({first_line(error)})") from error
            except httpx2.RequestError as error:
                problem = self._no_answer(error)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                said = self._words(text) or "an empty body"
                problem = f"an answer that is not OpenAI's JSON ({type(error).__name__}: {first_line(error)}; {said})"
            attempt += 1
            if attempt < TRIES:
                self._stop.wait(min(wait, LONGEST_WAIT))
        fix = "answers so far are cached, so fix it and rerun the same command"
        raise UserError(self._redacted(f"{url}: {problem}, {TRIES} times; {fix}"))

    def _reply(self, url: str, sent: dict[str, Any]) -> tuple[int, float | None, str]:
        """Status, Retry-After and text, whole within --llm-timeout, even if blanks keep the connection alive."""
        end = time.monotonic() + self._config.llm_timeout
        content = bytearray()
        with self._client.stream("POST", url, json=sent) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the answer did not end")
        headers = response.headers
        milliseconds = headers.get("retry-after-ms")
        wait = _retry_after(f"{milliseconds}ms" if milliseconds else headers.get("retry-after"))
        text = content.decode("utf-8", "replace")
        if 300 <= response.status_code < 400:
            text = f"moved to {headers.get('location', 'another place')}"
        return response.status_code, wait, text

    def _no_answer(self, error: httpx2.RequestError) -> str:
        told = f"no answer ({type(error).__name__}: {first_line(error)})"
        late = f" within the {self._config.llm_timeout} seconds of --llm-timeout"
        return told.replace("no answer", "no answer" + late) if isinstance(error, httpx2.TimeoutException) else told

    def _sent(self, body: dict[str, Any]) -> dict[str, Any]:
        """Adapt a request to the options that this server accepts."""
        sent = {name: value for name, value in body.items() if name != "places" and name not in self._refused}
        if "max_tokens" in body and "max_tokens" in self._refused and "max_completion_tokens" not in self._refused:
            sent["max_completion_tokens"] = body["max_tokens"]
        if "logprobs" in body:
            sent |= LOGPROBS[self._logprobs]
        if SYSTEM in self._refused and "messages" in body:
            content = "\n\n".join(message["content"] for message in body["messages"])
            sent["messages"] = [{"role": "user", "content": content}]
        return sent

    def _does_without(self, url: str, status: int, text: str, sent: dict[str, Any]) -> bool:
        """Whether the server refuses an option in `sent`, which is then never sent again."""
        name = refused_option(text, sent) if status >= 400 and status not in (401, 402, 403, 404, 408, 429) else None
        if name is None:
            return False
        said = self._words(text)
        if name == "echo":
            raise UserError(
                f"{url}: the server gives no log-probabilities of the prompt itself (echo: {said}), which all-at-once "
                "needs; vLLM does; or run the model here (--llm HUB_NAME or FOLDER)"
            )
        with self._turn:
            if name in ("logprobs", "top_logprobs"):
                now = LOGPROBS.index({key: sent[key] for key in ("logprobs", "top_logprobs") if key in sent})
                if now + 1 == len(LOGPROBS):
                    raise UserError(f"{url}: the server gives no log-probabilities ({said}); it can only explain")
                fresh, self._logprobs = self._logprobs == 0, max(now + 1, self._logprobs)
            else:
                fresh = name not in self._refused
                self._refused.add(name)
            if fresh:
                self._say(f"{url}: the server refuses {name} ({said}); it is asked in another way from now on")
        return True

    def _check_refusal(self, url: str, status: int, text: str, problem: str, retry_after: float | None) -> None:
        """Raise UserError for a permanent refusal, RefusedError if the prompt is the cause."""
        said = words(text)
        fix = "change the options of the request, or use another server"
        spent = QUOTA.search(said) and (retry_after is None or "insufficient" in said)
        if status == 402 or (status in (403, 429) and spent):
            raise UserError(f"{url}: {problem}; the account has nothing left: top it up, or use another server")
        if status in REFUSALS or (status not in (401, 404, 429) and PROMPT.search(said)):
            raise RefusedError(f"{url}: {problem}; {fix}", [NoAnswer(REFUSED + problem, f"{fix} than {self._url}")])
        if status not in PASSING:
            raise UserError(f"{url}: {problem}; {self._fix(status) or fix}")

    def _wait_for_turn(self) -> None:
        """Wait as long as the limit of requests per minute requires."""
        if self._config.llm_per_minute:
            with self._turn:
                at = max(self._next, time.monotonic())
                self._next = at + 60 / self._config.llm_per_minute
            self._stop.wait(at - time.monotonic())

    def _say(self, text: str) -> None:
        say(text if self._url in text else f"{self._url}: {text}")

    def _words(self, text: str) -> str:
        """A server's message, with the key removed in case it repeats it."""
        return words(self._redacted(text))

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _fix(self, status: int) -> str:
        if status in (401, 403):
            return f"is the right key in ${self._config.llm_key_env}?"
        if status == 404 or status < 400:
            return "check the address (it mostly ends in /v1) and --llm-model"
        return ""


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


def _retry_after(text: str | None) -> float | None:
    """Seconds in a Retry-After header: seconds, a date, or spans such as 20ms and 1m30s; None for anything else."""
    text = (text or "").strip()
    spans = re.findall(r"([\d.]+(?:e\d+)?)\s*(ms|s|m|h|d|)(?![a-z])", text.lower())
    if spans and "".join(number + unit for number, unit in spans) == text.lower().replace(" ", ""):
        try:
            return min(sum(float(number) * _UNITS[unit] for number, unit in spans), LONGEST_WAIT)
        except ValueError:
            return None
    try:
        wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, wait), LONGEST_WAIT)
