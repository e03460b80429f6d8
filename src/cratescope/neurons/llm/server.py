"""A language model behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, or a hosted one."""

from __future__ import annotations

import email.utils
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from jaxtyping import Float

from cratescope.config import LLMConfig
from cratescope.lm.offline import cache
from cratescope.neurons.llm import Choices, Ids, check_slots, encode, heads, spelled
from cratescope.neurons.llm.cache import AnswerCache
from cratescope.run import UserError, first_line

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
"""Seconds before the second try, doubled for every further one; and at most, whatever the server asks for."""
TOP = 20
"""Likeliest tokens asked for at a place: as many as vLLM gives unless told otherwise."""
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses after which the same request may succeed."""
BY_ID = "return_tokens_as_token_ids"
"""vLLM's option to name tokens by their ids, so that none is taken for another; stricter servers refuse to know it."""
CONTINUE = "Continue the user's text. Write only what comes next, without repeating any of it, on one line."
Read = Callable[[Any], Any]


class ServerLLM:
    """Asks a server, several requests at once; every answer is kept on disk and never asked for again.

    Without a tokenizer an "id" is a character, which is all that explanations need. With the model's own (given by
    name) ids are the model's, and log-probabilities at places of a prompt can be asked for.
    """

    dtype = "served"

    def __init__(self, config: LLMConfig, answers: AnswerCache, tokenizer: Any = None) -> None:
        self.name = config.llm_model
        self._config, self._answers, self._tokenizer = config, answers, tokenizer
        self._url = config.llm.rstrip("/")
        self._key = os.environ.get(config.llm_key_env, "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(headers=headers, timeout=config.llm_timeout)
        self._turn, self._next, self._stop = threading.Lock(), 0.0, threading.Event()
        self._unknown: set[str] = set()  # options that this server has refused

    @classmethod
    def open(cls, config: LLMConfig) -> ServerLLM:
        """Nothing is asked yet.

        Raises:
            UserError: no model named, a key in the address, or a tokenizer that cannot be loaded.
        """
        address = urlsplit(config.llm)
        if address.username or address.password or address.query:
            raise UserError(f"--llm: a key does not belong in an address; put it into ${config.llm_key_env}")
        if not config.llm_model:
            raise UserError(f"--llm {config.llm}: name one of the server's models with --llm-model")
        tokenizer = None
        if config.llm_tokenizer:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(config.llm_tokenizer, trust_remote_code=False)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"--llm-tokenizer {config.llm_tokenizer}: cannot load it ({first_line(error)}); "
                    "give the hub name or folder of the served model"
                ) from error
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would tell of every request
        return cls(config, AnswerCache(cache() / "answers.sqlite3"), tokenizer)

    def encode(self, text: str) -> list[int]:
        return [ord(sign) for sign in text] if self._tokenizer is None else encode(self._tokenizer, text)

    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        asked = {"model": self.name, "max_tokens": max_new_tokens, "temperature": 0, "seed": 0}
        if self._config.llm_chat:
            system = {"role": "system", "content": CONTINUE}
            texts = [self._decode([*prefix, *prompt]) for prompt in prompts]
            bodies = [asked | {"messages": [system, {"role": "user", "content": text}]} for text in texts]
            answers = self._ask("chat/completions", bodies, [_chat_text] * len(bodies))
            return [text.lstrip().split(stop)[0] for text in answers]
        bodies = [asked | {"prompt": self._prompt([*prefix, *prompt]), "stop": [stop]} for prompt in prompts]
        return [text.split(stop)[0] for text in self._ask("completions", bodies, [_text] * len(bodies))]

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
            # What may follow the first token of a choice is another prompt, one a slot.
            for head in begun[1:]:
                ids = [[*prefix, *prompt[:slot], *head] for slot in row]
                asked += [(one, [len(one)]) for one in ids]
        answers = iter(self._likeliest(asked))
        found = []
        for row in slots:
            tops = {begun[0]: next(answers)}
            for head in begun[1:]:
                tops[head] = [next(answers)[0] for _ in row]
            found.append(
                np.array([[self._logprob(tops, place, ids) for ids in spelled(choices)] for place in range(len(row))])
            )
        return found

    def _logprob(self, tops: dict[tuple[int, ...], list[dict[str, float]]], place: int, ids: tuple[int, ...]) -> float:
        """log P of a sequence; -inf where a token of it is not among the likeliest."""
        total = 0.0
        for step, token in enumerate(ids):
            top = tops[ids[:step]][place]
            total += top.get(f"token_id:{token}", top.get(self._decode([token]), -math.inf))
        return total

    def _likeliest(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[list[dict[str, float]]]:
        """The likeliest tokens and their log-probabilities at places of prompts, up to the place behind the end."""
        bodies, reads = [], []
        for ids, places in asked:
            prompt = self._prompt(ids)
            places = [place + len(prompt) - len(ids) for place in places]
            echo = places != [len(prompt)]
            body = {"model": self.name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
            bodies.append(body | {BY_ID: True} | ({"echo": True, "places": places} if echo else {}))
            reads.append(_tops(places if echo else [-1], len(prompt) + 1 if echo else 1, self._url))
        return self._ask("completions", bodies, reads)

    def _prompt(self, ids: list[int]) -> str | list[int]:
        return self._decode(ids) if self._tokenizer is None else [*self._tokenizer("").input_ids[:1], *ids]

    def _decode(self, ids: Ids) -> str:
        return "".join(map(chr, ids)) if self._tokenizer is None else self._tokenizer.decode(ids)

    def _ask(self, path: str, bodies: Sequence[dict[str, Any]], reads: Sequence[Read]) -> list[Any]:
        """What `reads` find in the answers: those on disk, and the rest from the server, each stored at once."""
        requests = [{"url": self._url, "path": path, "body": body} for body in bodies]
        keys = [json.dumps(request, sort_keys=True) for request in requests]
        known = {
            key: answer for key, answer in zip(keys, self._answers.find(requests), strict=True) if answer is not None
        }
        missing = {key: place for place, key in enumerate(keys) if key not in known}
        self._stop.clear()
        pool = ThreadPoolExecutor(self._config.llm_concurrency)
        try:
            jobs = {pool.submit(self._answer, requests[place], reads[place]): key for key, place in missing.items()}
            for job in as_completed(jobs):
                known[jobs[job]] = job.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        return [known[key] for key in keys]

    def _answer(self, request: dict[str, Any], read: Read) -> Any:
        body = {name: value for name, value in request["body"].items() if name != "places"}
        try:
            answer = self._post(f"{self._url}/{request['path']}", body, read)
        except UserError:
            self._stop.set()  # the others are not worth trying
            raise
        self._answers.store(request, answer)
        return answer

    def _post(self, url: str, body: dict[str, Any], read: Read) -> Any:
        """What `read` finds in the server's answer; failures that may pass are tried again, later and later."""
        problem = "stopped"
        for attempt in range(TRIES):
            self._wait_for_turn()
            if self._stop.is_set():
                break
            wait = FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
            try:
                sent = {name: value for name, value in body.items() if name not in self._unknown}
                response = self._client.post(url, json=sent)
                if response.is_success:
                    return read(response.json())
                problem = f"status {response.status_code}{self._said(response)}"
                if response.status_code in (400, 422) and BY_ID in sent and BY_ID in response.text:
                    self._unknown.add(BY_ID)
                    continue
                if response.status_code not in PASSING:
                    raise UserError(f"{url}: {problem}; {self._fix(response.status_code)}")
                wait = _retry_after(response.headers.get("retry-after")) or wait
            except httpx2.InvalidURL as error:
                raise UserError(f"{url}: not an address ({first_line(error)})") from error
            except httpx2.RequestError as error:
                problem = f"no answer ({type(error).__name__}: {first_line(error)})"
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                problem = f"an answer that is not OpenAI's JSON ({type(error).__name__}: {first_line(error)})"
            if attempt + 1 < TRIES:
                self._stop.wait(min(wait, LONGEST_WAIT))
        raise UserError(
            self._redacted(
                f"{url}: {problem}, {TRIES} times; what was answered is kept, so mend it and run the same command again"
            )
        )

    def _wait_for_turn(self) -> None:
        """Keep to so many requests a minute."""
        if self._config.llm_per_minute:
            with self._turn:
                at = max(self._next, time.monotonic())
                self._next = at + 60 / self._config.llm_per_minute
            self._stop.wait(at - time.monotonic())

    def _said(self, response: httpx2.Response) -> str:
        """What a server says of its refusal, without the key it may repeat."""
        text = " ".join(response.text.split())[:200]
        return f" ({self._redacted(text)})" if text else ""

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _fix(self, status: int) -> str:
        if status in (401, 403):
            return f"is the right key in ${self._config.llm_key_env}?"
        if status == 404:
            return "check the address (it mostly ends in /v1) and --llm-model"
        return "change the request's options, or use another server"


def _text(answer: Any) -> str:
    return _string(answer["choices"][0]["text"])


def _chat_text(answer: Any) -> str:
    return _string(answer["choices"][0]["message"]["content"] or "")


def _string(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError("no text in it")
    return text


def _tops(places: Sequence[int], n: int, url: str) -> Read:
    """Reads the likeliest tokens at `places` of an answer that tells of `n` tokens."""

    def read(answer: Any) -> list[dict[str, float]]:
        told = answer["choices"][0].get("logprobs")
        if not told:
            raise UserError(f"{url}: the server gives no log-probabilities; it can explain, and not simulate")
        if "content" in told:  # llama.cpp answers like a chat
            told = {"top_logprobs": [_named(token["top_logprobs"]) for token in told["content"]]}
        tops = told["top_logprobs"]
        if len(tops) == 1 < n:
            raise UserError(
                f"{url}: the server gives no log-probabilities of the prompt itself (echo), which all-at-once needs; "
                "vLLM does; or run the model here (--llm HUB_NAME or FOLDER)"
            )
        if len(tops) != n:
            raise ValueError(f"log-probabilities of {len(tops)} tokens instead of {n}")
        return [{str(token): _log(value) for token, value in tops[place].items()} for place in places]

    return read


def _named(tokens: Any) -> dict[str, float]:
    return {f"token_id:{token['id']}" if "id" in token else token["token"]: token["logprob"] for token in tokens}


def _log(value: Any) -> float:
    if not (isinstance(value, (int, float)) and value <= 1e-3):
        raise ValueError(f"{value} is no log-probability")
    return float(value)


def _retry_after(text: str | None) -> float | None:
    """Seconds in a Retry-After header, which holds seconds or a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
