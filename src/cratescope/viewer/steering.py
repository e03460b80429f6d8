"""Steering from the page: what `cratescope steer` does, told token by token."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cratescope.errors import UserError
from cratescope.files import misfit
from cratescope.neurons.config import SteerConfig
from cratescope.neurons.continuations import Continuations, Kind, TokenChange, continuations
from cratescope.viewer.loaded import LONGEST_TEXT, Models
from cratescope.viewer.opened import Opened
from cratescope.viewer.values import number

MOST_TOKENS = 1000
MOST_EDITS = 100
REQUEST = {
    **{"run": str, "prompt": str, "edits": [str], "sae?": str},
    **{"tokens?": int, "temperature?": float, "seed?": int},
}
HELD = "\ufffd"
"""What a character is decoded as while some of its bytes are still to come."""
Event = dict[str, Any]


class GoneError(Exception):
    """Who asked has gone."""


def settings(opened: Opened, request: Mapping[str, Any]) -> SteerConfig:
    """What a request asks for. UserError: not of the shape `REQUEST`, or a value out of range."""
    if wrong := misfit(request, REQUEST, "the request"):
        raise UserError(f"{wrong}; send run, prompt, edits, sae, tokens, temperature and seed as docs/viewer.md says")
    if len(request["prompt"]) > LONGEST_TEXT:
        raise UserError(f"prompt: has {len(request['prompt']):,} characters; give at most {LONGEST_TEXT:,}")
    if len(request["edits"]) > MOST_EDITS:
        raise UserError(f"edits: {len(request['edits'])} are too many; give at most {MOST_EDITS}")
    if (sae := request.get("sae", "delta")) not in ("delta", "replace"):
        raise UserError(f"sae {sae!r:.80}: choose delta or replace")
    if request.get("tokens", 0) > MOST_TOKENS:
        raise UserError(f"tokens {request['tokens']}: has to be {MOST_TOKENS} or less")
    chosen = {name: request[name] for name in ("tokens", "temperature", "seed") if name in request}
    return SteerConfig(opened.run.root, tuple(request["edits"]), prompt=request["prompt"], sae=sae, **chosen)


def steer(
    config: SteerConfig, opened: Opened, models: Models, tell: Callable[[Event], None], gone: threading.Event
) -> None:
    """Write plain and steered text, telling every event; ends early when `gone` is set. Errors of `continuations`."""
    loaded = models.of(opened)
    tell({"kind": "start", "prompt_tokens": len(loaded.ids(config.prompt))})
    spoken = {kind: Spoken(opened, kind, tell) for kind in ("plain", "steered")}

    def heard(kind: Kind, token: int, logprob: float) -> None:
        if gone.is_set():
            raise GoneError
        spoken[kind].hear(token, logprob)

    with contextlib.suppress(GoneError):
        found = continuations(config, opened.run, loaded.model, heard)
        for one in spoken.values():
            one.end()
        tell(ended(found))


class Spoken:
    """Turns the tokens of one text into pieces of it: a token that ends inside of a character comes with the next."""

    def __init__(self, opened: Opened, kind: str, tell: Callable[[Event], None]) -> None:
        self.tokenizer, self.kind, self.tell = opened.run.tokenizer, kind, tell
        self.ids: list[int] = []
        self.told = 0
        self.logprob = 0.0

    def hear(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprob = logprob
        text = str(self.tokenizer.decode(self.ids))
        self._say("" if text.endswith(HELD) else text[self.told :])

    def end(self) -> None:
        """Tell what is left of an unfinished character."""
        if rest := str(self.tokenizer.decode(self.ids))[self.told :]:
            self._say(rest)

    def _say(self, text: str) -> None:
        self.told += len(text)
        self.tell({"kind": self.kind, "text": text, "logprob": number(self.logprob)})


def ended(found: Continuations) -> Event:
    """The last event: what the edits do to the predictions."""
    return {
        "kind": "end",
        "rises": _changes(found.rises),
        "falls": _changes(found.falls),
        "kl_prompt": number(found.kl_prompt),
        "kl_generated": number(found.kl_generated),
        "generated": found.generated,
    }


def _changes(changes: Sequence[TokenChange]) -> list[Event]:
    return [
        {"text": one.text} | {name: number(getattr(one, name)) for name in ("change", "plain", "steered")}
        for one in changes
    ]
