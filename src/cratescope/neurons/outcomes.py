"""What edits do to a model's predictions on a fixed text, and to the text that it writes (docs/steering.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.neurons.pushed import Pushes, Tail, logits_of, pushed

Numbers = dict[str, Float64[Tensor, " b"]]
AT_ONCE = {"cpu": 1 << 21}
"""Logits in memory at a time: on a CPU as many as stay in its cache."""
MANY = 1 << 27


@dataclass(frozen=True, eq=False)
class Aimed:
    """Edits, with the tokens (b, k) that each is to raise: those of its unit, and those of the direction it writes.

    The two differ for controls only.
    """

    pushes: Pushes
    targets: Int64[Tensor, "b k"]
    aims: Int64[Tensor, "b k"]

    def split(self, n: int) -> Iterator[Aimed]:
        """At most n edits at a time."""
        for start in range(0, len(self.targets), n):
            rows = slice(start, start + n)
            yield Aimed(self.pushes.only(rows), self.targets[rows], self.aims[rows])

    @property
    def sets(self) -> dict[str, Int64[Tensor, "b k"]]:
        """The tokens by what the names of their numbers begin with."""
        return {"": self.targets, "aim_": self.aims}


class FixedText:
    """Held-out texts of c x (t + 1) tokens: predictions in the last quarter of each are looked at."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Int64[Tensor, "c s"]) -> None:
        self._model = model
        self.tokens, labels = tokens[:, :-1], tokens[:, 1:]
        self.last = (self.tokens.shape[1] + 3) // 4
        self._labels = labels[:, -self.last :, None]
        rows = self.tokens.split(self._together(1))
        logits = [logits_of(model, some, self.last, use_cache=False).logits.float() for some in rows]
        self._logits = torch.cat(logits)
        self._plain = self._logits.log_softmax(-1)

    def _together(self, n: int) -> int:
        """How many of things that have `n` rows of text each to take at once."""
        size = n * self.last * self._model.config.get_text_config().vocab_size
        return max(1, AT_ONCE.get(self._model.device.type, MANY) // size)

    def measured(self, tail: Tail, aimed: Aimed) -> Numbers:
        """Means over texts and tokens, of each edit.

        kl: KL(steered || plain), nats. loss: change of the loss, nats. Of the targets, and with `aim_` those of the
        direction: logit and logprob, mean change of their logits and log-probabilities; mass and mass_plain, the sum
        of their probabilities with the edit and without.
        """
        parts = [self._measured(tail, some) for some in aimed.split(self._together(len(self.tokens)))]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not found["kl"].isfinite().all():
            raise UserError("with an edit the model's logits are not finite; give smaller --strengths")
        return found

    @torch.no_grad()
    def _measured(self, tail: Tail, aimed: Aimed) -> Numbers:
        logits = tail.logits(aimed.pushes).float()
        b, c, last, _ = logits.shape
        logprobs = logits.log_softmax(-1)
        gone = self._plain.gather(-1, self._labels) - logprobs.gather(-1, self._labels.expand(b, c, last, 1))
        found = {"loss": gone.mean((1, 2, 3))}
        for name, tokens in aimed.sets.items():
            where = tokens[:, None, None].expand(b, c, last, -1)
            after, before = logprobs.gather(-1, where), self._plain.expand_as(logprobs).gather(-1, where)
            change = logits.gather(-1, where) - self._logits.expand_as(logits).gather(-1, where)
            found |= {f"{name}logit": change.mean((1, 2, 3)), f"{name}logprob": (after - before).mean((1, 2, 3))}
            found[f"{name}mass"] = after.exp().sum(-1).mean((1, 2))
            found[f"{name}mass_plain"] = before.exp().sum(-1).mean((1, 2))
        chances = logprobs.exp()
        found["kl"] = torch.linalg.vecdot(chances, logprobs.sub_(self._plain)).mean((1, 2))
        return {name: values.double() for name, values in found.items()}


@dataclass(frozen=True, eq=False)
class Writing:
    """Texts of `length` tokens that the model writes after prompts, drawn at temperature 1.

    All rows draw by the same random numbers (the Gumbel noise of a prompt and a token), so what differs is what an edit
    does. Text goes on where a document ends.
    """

    model: Any
    prompts: Sequence[Sequence[int]]
    length: int
    seed: int

    def measured(self, aimed: Aimed) -> Numbers:
        """Means over the prompts, of each edit.

        rate, rate_plain (and with `aim_`): share of the written tokens that are targets, with the edit and without.
        nats, nats_plain: loss of the written tokens by the model without the edit. distinct, distinct_plain: share of
        pairs of neighbouring tokens that are different ones.
        """
        found = [self._measured(aimed, prompt) for prompt in range(len(self.prompts))]
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}

    @torch.no_grad()
    def _measured(self, aimed: Aimed, prompt: int) -> Numbers:
        n = len(aimed.targets)
        plain, plain_nats = self.plain[prompt]
        with pushed(self.model, aimed.pushes):
            written = self._written(prompt, n)
        nats = self._nats(prompt, written)
        found = {"nats": nats, "nats_plain": plain_nats.expand(n)}
        found |= {"distinct": distinct(written), "distinct_plain": distinct(plain).expand(n)}
        for name, tokens in aimed.sets.items():
            for end, texts in (("", written), ("_plain", plain)):
                hits = (texts[..., None] == tokens.to(texts.device)[:, None]).any(-1)
                found[f"{name}rate{end}"] = hits.double().mean(1)
        return found

    @cached_property
    @torch.no_grad()
    def plain(self) -> list[tuple[Int64[Tensor, "1 l"], Float64[Tensor, " 1"]]]:
        """Of each prompt what the model writes without edits, and its loss."""
        texts = [self._written(prompt, 1) for prompt in range(len(self.prompts))]
        return [(text, self._nats(prompt, text)) for prompt, text in enumerate(texts)]

    def _begin(self, prompt: int, n: int) -> Int64[Tensor, "n p"]:
        return torch.tensor([list(self.prompts[prompt])], device=self.model.device).repeat(n, 1)

    def _written(self, prompt: int, n: int) -> Int64[Tensor, "n l"]:
        """n texts after a prompt; those of one edit are the same."""
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt)
        tokens = given = self._begin(prompt, n)
        past: dict[str, Any] = {}
        for _ in range(self.length):
            found = logits_of(self.model, given, 1, use_cache=True, **past)
            logits = found.logits[:, -1].float()
            noise = torch.rand(logits.shape[1], generator=chance).clamp_min(1e-20).log_().neg_().log_().neg_()
            drawn = (logits + noise.to(logits.device)).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, drawn], 1)
            cache = getattr(found, "past_key_values", None)
            past, given = ({"past_key_values": cache}, drawn) if cache is not None else ({}, tokens)
        return tokens[:, -self.length :]

    def _nats(self, prompt: int, written: Int64[Tensor, "n l"]) -> Float64[Tensor, " n"]:
        """Mean loss of each written text by the model as it is."""
        tokens = torch.cat([self._begin(prompt, len(written)), written], 1)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = max(1, AT_ONCE.get(self.model.device.type, MANY) // (self.length * vocabulary))
        losses = []
        for some in tokens.split(rows):
            logits = logits_of(self.model, some[:, :-1], self.length, use_cache=False).logits.float()
            found = logits.log_softmax(-1).gather(-1, some[:, -self.length :, None])
            losses.append(-found.double().mean((1, 2)))
        return torch.cat(losses)


def distinct(texts: Int64[Tensor, "n l"]) -> Float64[Tensor, " n"]:
    """Share of the pairs of neighbouring tokens of each text that are different ones; 1 where there is none."""
    if texts.shape[1] < 2:
        return torch.ones(len(texts), dtype=torch.float64, device=texts.device)
    pairs = (texts[:, :-1] * (texts.max() + 1) + texts[:, 1:]).sort(1).values
    return 1 - (pairs.diff(dim=1) == 0).double().sum(1) / pairs.shape[1]
