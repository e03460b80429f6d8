"""Measure what every neuron does to predictions, by the weights and on held-out text (docs/effects.md)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.hardware import pick_device
from cratescope.lm.load import data_of
from cratescope.models.folder import context_length, load_folder, model_config, text_config
from cratescope.neurons.coded import recorded_site
from cratescope.neurons.config import EffectsConfig
from cratescope.neurons.directions import Readout, output_directions
from cratescope.neurons.effects import Effects, TokenChange, TokenLogit, kept_effects
from cratescope.neurons.forced import Forced, Read
from cratescope.neurons.records import NeuronRecord
from cratescope.neurons.sample import (
    DEAD,
    draw_neurons,
    find_site,
    record_files,
    records_identity,
    with_records,
)
from cratescope.neurons.sites import Site
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import encode, token_strings, vocabulary_strings
from cratescope.workers import share

VERSION = 1
"""Of how effects are measured: raise it when the same options give other numbers."""
SHOWN = 20
"""Tokens kept of each list, and those that make the scores of Arad et al."""
AMPLIFY = 10
"""The output score adds this many times the layer's largest activation at the token (Arad et al. 2025)."""
LOGITS_AT_ONCE = 1 << 24
NO_MAXIMUM = "its maximum is not above 0"


def effects(config: EffectsConfig) -> Path:
    """Write a table of effects per layer and return their folder; finished neurons are kept.

    A dead neuron has tokens by its weights alone. Where the weights have no directions, as before a norm, every neuron
    has measured ones alone.

    Raises:
        UserError: no such site, layer or number of neurons; records of another model; no data; a text too long; or
            logits that are not finite.
    """
    run = Run(config.run)
    folder = find_site(run, config.site)
    site, files = recorded_site(run, folder), record_files(run.records(folder), config.layers)
    shape, data = model_config(run.trained_model()), data_of(run, config.data)
    context = context_length(shape, config.context)
    texts = data.split("heldout").spaced(config.contexts, context).tolist()
    kept = kept_effects(run.effects(folder))
    claim(kept.folder, _identity(config, run, folder, data))
    batch = min(config.batch_size, max(1, LOGITS_AT_ONCE // text_config(shape).vocab_size))
    opened = functools.cache(lambda: _opened(config, run))
    with kept.writing() as keep:
        for layer, path in files.items():
            sample = share(_sample(config, path, layer), config.worker, batch)
            done = kept.done(layer) & {*sample}
            chunks = [sample[start : start + batch] for start in range(0, len(sample), batch)]
            pending = [chunk for chunk in chunks if not done.issuperset(chunk)]
            if not pending:
                continue
            measured = _Measured(config, run, opened(), site, layer, texts)
            work = with_records(path, pending, 1, strata=())
            for chunk, records in progress(work, f"effects {run.name} {site.name} layer {layer}", len(pending)):
                for item in measured.of([records[index] for index in chunk]):
                    if item.neuron.index not in done:
                        keep(item)
    return kept.folder


def _opened(config: EffectsConfig, run: Run) -> PreTrainedModel:
    model: Any = load_folder(run.trained_model(), config.dtype)  # Any: the library's own annotation of `to`
    return model.to(pick_device(config.device)).eval()


def _sample(config: EffectsConfig, path: Path, layer: int) -> list[int]:
    """The neurons of a layer, in the order in which they are drawn."""
    drawn = draw_neurons(path, config.neuron_seed, layer)
    wanted = len(drawn) if config.neurons is None else config.neurons
    if wanted > len(drawn):
        raise UserError(
            f"--neurons {wanted}: layer {layer} has {len(drawn)} neurons in the records; give {len(drawn)} or fewer"
        )
    return drawn[:wanted]


def _identity(config: EffectsConfig, run: Run, folder: str, data: TokenData) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in ("contexts", "context", "strength", "prompt", "neuron_seed")}
    settings |= {} if config.dtype == "auto" else {"dtype": config.dtype}
    made_from = {"data_sha256": sha256(data.path / "manifest.json"), "effects_version": VERSION}
    return settings | made_from | records_identity(run, folder)


@dataclass(frozen=True, eq=False)
class _Weights:
    """Tokens by the weights of one layer: each neuron's direction (m, d), or the reason why there is none."""

    readout: Readout | None
    directions: Float32[Tensor, "m d"] | None
    reason: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, site: Site, layer: int) -> _Weights:
        try:
            return cls(Readout.of(model), output_directions(model, site, layer))
        except UserError as error:
            return cls(None, None, str(error))

    def logits(self, index: Int64[Tensor, " n"]) -> Float32[Tensor, "n V"] | None:
        """Less their mean over the vocabulary."""
        if self.readout is None or self.directions is None:
            return None
        found = self.readout.logits(self.directions[index.to(self.directions.device)])
        return (found - found.mean(1, keepdim=True)).cpu()


@dataclass(frozen=True, eq=False)
class _Change:
    """Means over contexts: of the change of logits less their mean, of the change of probabilities, and of KL."""

    logits: Float32[Tensor, "n V"]
    probabilities: Float32[Tensor, "n V"]
    kl: Float32[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class _Measured:
    """The effects of neurons of one layer.

    texts: of tokens, equally long; neurons are forced at their last tokens.
    """

    config: EffectsConfig
    run: Run
    model: PreTrainedModel
    site: Site
    layer: int
    texts: Sequence[list[int]]
    _held: dict[int, Read] = field(default_factory=dict)

    @cached_property
    def _forced(self) -> Forced:
        return Forced(self.model, self.site, self.layer)

    @cached_property
    def _weights(self) -> _Weights:
        return _Weights.of(self.model, self.site, self.layer)

    @cached_property
    def _neutral(self) -> Read:
        """The neutral prompt of the output score."""
        [ids] = encode(self.run.tokenizer, [self.config.prompt])
        if not ids:
            raise UserError("--prompt: has no token; give some text")
        context_length(self.model.config, len(ids))
        return self._forced.read(ids)

    def of(self, records: Sequence[NeuronRecord]) -> list[Effects]:
        """Of some neurons, in their order."""
        index = torch.tensor([record.neuron.index for record in records])
        reasons = [_unmeasured(record) for record in records]
        values = [self.config.strength * record.moments.maximum for record in records]
        live = [place for place, reason in enumerate(reasons) if reason is None]
        direct, change = self._weights.logits(index), None
        if live:
            change = self._change(index[live], torch.tensor([values[place] for place in live], dtype=torch.float64))
        tops = None if direct is None else self._tops(direct)
        amplified, plain = self._output_scores(index, tops)
        shares = spearman(direct[live], change.logits, self._known) if direct is not None and change else None
        found = []
        for place, (record, reason) in enumerate(zip(records, reasons, strict=True)):
            row = None if reason else live.index(place)
            found.append(
                Effects(
                    record.neuron,
                    None if reason else values[place],
                    len(self.texts),
                    *self._by_weights(direct, place),
                    *self._by_change(change, row),
                    kl=None if change is None or row is None else float(change.kl[row]),
                    direct_share=None if shares is None or row is None else _finite(shares[row]),
                    input_score=None if tops is None or reason else input_score(record, tops[place].tolist()),
                    output_score=None if amplified is None else _finite(amplified[place]),
                    output_score_plain=None if plain is None else _finite(plain[place]),
                    unmeasured=reason,
                    undirected=self._weights.reason,
                )
            )
        return found

    @cached_property
    def _known(self) -> int:
        """Tokens of the vocabulary that the tokenizer has; a model may have more, which nothing says."""
        return min(len(vocabulary_strings(self.run.tokenizer)), len(self._neutral.logits))

    def _tops(self, logits: Float32[Tensor, "n V"]) -> Int64[Tensor, "n k"]:
        return logits[:, : self._known].topk(min(SHOWN, self._known)).indices

    def _change(self, index: Int64[Tensor, " n"], value: Float64[Tensor, " n"]) -> _Change:
        """Mean change over the texts. The sums are made in place, as most of the time goes into reading the logits."""
        logits, chances, kl = (torch.zeros(()) for _ in range(3))
        for place, text in enumerate(self.texts):
            read = self._held.get(place) or self._held.setdefault(place, self._forced.read(text))
            before, after = read.logits.log_softmax(-1), self._forced.logits(read, index, value)
            chance = after.softmax(-1)
            # log p = logit - (log of the sum of all exp), which the likeliest token tells without another sum.
            total = after.amax(1) - chance.amax(1).log()
            divergence = torch.einsum("nv,nv->n", chance, after) - total - chance @ before
            found = after.sub_(read.logits), chance.sub_(before.exp()), divergence
            sums = (logits, chances, kl) if logits.ndim else tuple(map(torch.zeros_like, found))
            logits, chances, kl = (one.add_(other) for one, other in zip(sums, found, strict=True))
        logits -= logits.mean(1, keepdim=True)
        return _Change(*((one / len(self.texts)).cpu() for one in (logits, chances, kl)))

    def _output_scores(
        self, index: Int64[Tensor, " n"], tops: Int64[Tensor, "n k"] | None
    ) -> tuple[Float64[Tensor, " n"] | None, Float64[Tensor, " n"] | None]:
        """With the neurons amplified, and without."""
        if tops is None:
            return None, None
        read = self._neutral
        largest = read.neurons.max().clamp_min(0)
        value = read.neurons.cpu()[index] + AMPLIFY * float(largest)
        forced = self._forced.logits(read, index, value).cpu()
        return output_score(forced, tops), output_score(read.logits.cpu().expand_as(forced), tops)

    def _by_weights(
        self, direct: Float32[Tensor, "n V"] | None, place: int
    ) -> tuple[tuple[TokenLogit, ...], tuple[TokenLogit, ...]]:
        """The tokens raised and lowered."""
        if direct is None:
            return (), ()
        row = direct[place, : self._known]

        def logits(found: Iterable[tuple[int, str]]) -> tuple[TokenLogit, ...]:
            return tuple(TokenLogit(token, text, float(row[token])) for token, text in found)

        return logits(self._most(row)), logits(self._most(-row))

    def _by_change(
        self, change: _Change | None, row: int | None
    ) -> tuple[tuple[TokenChange, ...], tuple[TokenChange, ...]]:
        """The tokens raised and lowered."""
        if change is None or row is None:
            return (), ()
        moved, chances = change.logits[row, : self._known], change.probabilities[row]

        def changes(found: Iterable[tuple[int, str]]) -> tuple[TokenChange, ...]:
            return tuple(TokenChange(token, text, float(moved[token]), float(chances[token])) for token, text in found)

        return changes(self._most(moved)), changes(self._most(-moved))

    def _most(self, values: Float32[Tensor, " v"]) -> Iterable[tuple[int, str]]:
        """The tokens of the largest values, the largest first, and their texts."""
        tokens = values.topk(min(SHOWN, len(values))).indices.tolist()
        return zip(tokens, token_strings(self.run.tokenizer, tokens), strict=True)


def _unmeasured(record: NeuronRecord) -> str | None:
    return DEAD if record.dead else None if record.moments.maximum > 0 else NO_MAXIMUM


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def input_score(record: NeuronRecord, tokens: Sequence[int]) -> float | None:
    """Share of the top windows whose peak is one of the tokens; None without windows."""
    peaks = [int(window.tokens[window.peak]) for window in record.top]
    return sum(peak in tokens for peak in peaks) / len(peaks) if peaks else None


def output_score(logits: Float32[Tensor, "n V"], tokens: Int64[Tensor, "n k"]) -> Float64[Tensor, " n"]:
    """(1 - least rank / V) x largest probability of the tokens; the likeliest of all tokens has rank 0."""
    best = logits.gather(1, tokens).amax(1, keepdim=True)
    rank = (logits > best).sum(1)
    chance = (best[:, 0].double() - logits.double().logsumexp(1)).exp()
    return (1 - rank / logits.shape[1]) * chance


def spearman(one: Float32[Tensor, "n V"], other: Float32[Tensor, "n V"], known: int) -> Float64[Tensor, " n"]:
    """Rank correlation of each row over the first `known` tokens; NaN for a constant row."""
    ranks = [average_ranks(values[:, :known]) for values in (one, other)]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def average_ranks(values: Float32[Tensor, "n v"]) -> Float64[Tensor, "n v"]:
    """Ranks from 0 in each row; equal values have the mean of theirs."""
    ordered, places = values.sort(1)
    n = values.shape[1]
    position = torch.arange(n, device=values.device).expand_as(places)
    new = torch.ones_like(places, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, position, 0).cummax(1).values
    ends = torch.ones_like(new)
    ends[:, :-1] = new[:, 1:]
    last = torch.where(ends, position, n).flip(1).cummin(1).values.flip(1)
    return torch.zeros_like(values, dtype=torch.float64).scatter_(1, places, (first + last).double() / 2)
