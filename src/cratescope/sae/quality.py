"""How good a sparse autoencoder is, on the validation split (`evaluate --sae`).

x an activation, y its reconstruction, m the mean of x over the tokens read, L the loss of the next token, KL the
divergence of the predicted next token from the model's own prediction; L_y and KL_y with y in the place of x, L_0 and
KL_0 with 0 or m in its place.

    explained variance   1 - sum |x - y|^2 / sum |x - m|^2     0 for y = m, 1 for y = x
    loss recovered       (L_0 - L_y) / (L_0 - L)               0 for an autoencoder as bad as the ablation, 1 for y = x
    KL recovered         1 - KL_y / KL_0                       the same

All are ratios of sums over documents, with the standard errors of lm/evaluate.py. Probing is in sae/probing.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import read_json, sha256, write_json
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import context_of, document_numbers, ratio
from cratescope.lm.evaluate import evaluate as evaluate_model
from cratescope.lm.head import plain_pass
from cratescope.lm.load import data_of, load_model
from cratescope.locks import locked
from cratescope.models.sae import SparseCoder
from cratescope.neurons.coded import CodedSite, find_coders
from cratescope.neurons.sites import Site, hooked, partial_pass
from cratescope.progress import progress
from cratescope.run import Run
from cratescope.sae.probing import Probing
from cratescope.text.shards import TokenData

VERSION = 1
"""Of these measures: raise it when the same autoencoder would be measured differently."""
LOGITS = 1 << 26
"""Logits held at once, of each of two predictions."""
EDGES = np.linspace(-6, 0, 25)
"""Edges of the histogram of log10 densities."""
ROWS = 1024
"""Decoder rows compared with all others at once."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run's model, and then its sparse autoencoders `config.sae`, which are `saes` of the result.

    Raises:
        UserError: as of `lm.evaluate.evaluate`; no such autoencoder, or one of another model.
    """
    run = Run(config.run)
    sites = {name: find_coders(run, name) for name in config.sae}
    result = evaluate_model(config)
    if not sites:
        return result
    return result | {"saes": {name: _measured(config, run, site, name) for name, site in sites.items()}}


def _measured(config: EvaluateConfig, run: Run, site: CodedSite, name: str) -> list[dict[str, Any]]:
    """A row per layer, from quality.json where that is of the same files and settings."""
    data, (context, _) = data_of(run, config.data), context_of(config, run)
    settings = {"version": VERSION, "crops": config.crops, "context": context, "model_sha256": run.fingerprint()}
    settings |= {"sae_sha256": dict(site.identity), "data_sha256": sha256(data.path / "manifest.json")}
    path = run.saes(name) / "quality.json"
    with locked(path.parent, "quality"):
        found = (
            read_json(path, {"settings?": {}, "layers?": [{}]}, "`cratescope evaluate --sae`") if path.exists() else {}
        )
        if found.get("settings") != settings:
            text, model = Text.of(data, config.crops, context), load_model(run, config.device)
            found = {"settings": settings, "layers": measure(model, site, text, config.batch_size)}
            write_json(path, found)
    return found["layers"]


@dataclass(frozen=True)
class Text:
    """Crops of a split, and the documents that their tokens are from.

    documents: numbered from 0, those that occur. parts: of each document the part of the corpus; None without parts.
    """

    tokens: Int[np.ndarray, "n t"]
    documents: Int[np.ndarray, "n t"]
    parts: Int[np.ndarray, " d"] | None

    @classmethod
    def of(cls, data: TokenData, crops: int, context: int) -> Text:
        """Evenly spaced crops of the validation split. UserError: it is too short."""
        split = data.split("validation")
        tokens = split.spaced(crops, context)
        occurring, numbers = np.unique(document_numbers(split, crops, context, data.eos_id), return_inverse=True)
        parts = data.parts("validation")
        # A cut document at the very end of a split has no <eos> and one number more than there are documents.
        of_each = None if parts is None else parts[1][np.minimum(occurring, len(parts[1]) - 1)]
        return cls(tokens, numbers.reshape(tokens.shape), of_each)

    @property
    def n_documents(self) -> int:
        return int(self.documents.max()) + 1


class Sums:
    """Sums over the tokens of each document, by name."""

    def __init__(self, n_documents: int) -> None:
        self._of: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(n_documents))

    def __getitem__(self, name: str) -> Float[np.ndarray, " d"]:
        return self._of[name]

    def add(self, documents: Int[np.ndarray, "n t"], **values: Shaped[Tensor, "n t"]) -> None:
        for name, each in values.items():
            found = np.bincount(documents.ravel(), each.double().cpu().numpy().ravel(), len(self._of[name]))
            self._of[name] += found


@dataclass(frozen=True)
class LayerQuality:
    """All that is added up of one layer's autoencoder."""

    coder: SparseCoder
    mean: Float[Tensor, " d"]
    sums: Sums
    active: Float[Tensor, " m"]
    probing: Probing | None


@torch.no_grad()
def measure(model: PreTrainedModel, site: CodedSite, text: Text, batch_size: int = 8) -> list[dict[str, Any]]:
    """Quality of the autoencoder of every layer of a site: a row each."""
    plain = Site(site.name, site.pattern)
    layers = sorted(site.coders)
    n = max(1, min(batch_size, LOGITS // (text.tokens.shape[1] * model.config.get_text_config().vocab_size)))
    means = _means(model, plain, layers, text.tokens, n)
    found = {}
    for layer in layers:
        coder, parts = site.coders[layer].to(model.device), text.parts
        probing = None if parts is None else Probing(coder.config.width, text.documents, parts, model.device)
        active = torch.zeros(coder.config.width, dtype=torch.float64, device=model.device)
        found[layer] = LayerQuality(coder, means[layer], Sums(text.n_documents), active, probing)
    for crops in progress(list(_batches(len(text.tokens), n)), f"evaluate {site.name}"):
        _add(model, plain, found, text, crops)
    return [{"layer": layer} | _row(one, text) for layer, one in found.items()]


def _batches(n_crops: int, n: int) -> Iterator[Int[np.ndarray, " c"]]:
    """Numbers of crops: first the even ones, by which features are chosen for probing, then the odd ones."""
    for start in (0, 1):
        chosen = np.arange(start, n_crops, 2)
        yield from (chosen[first : first + n] for first in range(0, len(chosen), n))


def _means(
    model: PreTrainedModel, site: Site, layers: Sequence[int], tokens: Int[np.ndarray, "n t"], n: int
) -> dict[int, Float[Tensor, " d"]]:
    """Mean activation of each layer over all tokens."""
    totals: dict[int, Tensor] = {}

    def visit(layer: int, x: Float[Tensor, "b t d"]) -> None:
        total = x.flatten(0, 1).double().sum(0)
        totals[layer] = totals[layer] + total if layer in totals else total

    with partial_pass(model, site, layers, visit) as run:
        for start in range(0, len(tokens), n):
            run(torch.from_numpy(tokens[start : start + n]).to(model.device))
    return {layer: (total / tokens.size).float() for layer, total in totals.items()}


def _add(
    model: PreTrainedModel, site: Site, layers: dict[int, LayerQuality], text: Text, crops: Int[np.ndarray, " c"]
) -> None:
    """Add some crops to the sums of every layer."""
    tokens = torch.from_numpy(text.tokens[crops]).to(model.device)
    documents = text.documents[crops]
    seen: dict[int, Tensor] = {}
    # Copied, since what comes after the site may write into its activations.
    with hooked(model, site, list(layers), lambda layer, x: seen.update({layer: x.clone()})):
        own = _Predictions.of(model, tokens)
    for layer, one in layers.items():
        x = seen[layer].float()
        z = one.coder.encode(x)
        y = one.coder.decode(z)
        apart = {"error": x - y, "variance": x - one.mean}
        sums = {name: value.square().sum(-1) for name, value in apart.items()}
        active = (z > 0).float()
        one.sums.add(documents, l0=active.sum(-1), tokens=torch.ones_like(tokens), **sums)
        one.active.add_(active.sum((0, 1)))
        if one.probing:
            one.probing.add(z.flatten(0, 1), crops)
        one.sums.add(documents[:, 1:], predicted=torch.ones_like(own.loss), loss=own.loss)
        for name, instead in (("y", y), ("zero", torch.zeros_like(x)), ("mean", one.mean.expand_as(x))):
            with hooked(model, site, [layer], partial(_replace, instead)):
                loss, kl = own.against(model, tokens)
            one.sums.add(documents[:, 1:], **{f"loss_{name}": loss, f"kl_{name}": kl})


def _replace(instead: Float[Tensor, "b t d"], layer: int, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    return instead.to(x.dtype)


@dataclass(frozen=True)
class _Predictions:
    """The model's own predictions p of the token after each but the last: p, sum p log p, and the loss (nats)."""

    p: Float[Tensor, "b s v"]
    negentropy: Float[Tensor, "b s"]
    loss: Float[Tensor, "b s"]

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Int[Tensor, "b t"]) -> _Predictions:
        logits = _logits(model, tokens).log_softmax(-1)
        p = logits.exp()
        return cls(p, torch.linalg.vecdot(p, logits), -_at(logits, tokens))

    def against(
        self, model: PreTrainedModel, tokens: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b s"]]:
        """Loss of the model as it is hooked now, and its divergence from these predictions, sum p (log p - log q)."""
        logits = _logits(model, tokens)
        total = logits.logsumexp(-1)
        return total - _at(logits, tokens), self.negentropy - torch.linalg.vecdot(self.p, logits) + total


def _logits(model: PreTrainedModel, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b s v"]:
    return plain_pass(model, tokens).logits[:, :-1].float()


def _at(values: Float[Tensor, "b s v"], tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b s"]:
    """Those of the tokens that follow."""
    return values.gather(2, tokens[:, 1:, None])[..., 0]


def _row(one: LayerQuality, text: Text) -> dict[str, Any]:
    sums, config = one.sums, one.coder.config
    own = sums["loss"]
    if not all(np.isfinite(sums[name]).all() for name in ("loss", "error", "loss_y")):
        raise UserError(
            f"layer {one.coder.origin.layer}: the loss is not a number with this autoencoder; train it again"
        )
    row: dict[str, Any] = {"kind": "frozen" if config.frozen else config.kind, "width": config.width}
    row |= _named("l0", *ratio(sums["l0"], sums["tokens"]))
    lost, error = ratio(sums["error"], sums["variance"])
    row |= _named("explained_variance", 1 - lost, error)
    row |= _named("mse", *ratio(sums["error"], sums["tokens"]))
    for name, kept in (("", "loss"), ("_replaced", "loss_y"), ("_zero", "loss_zero"), ("_mean", "loss_mean")):
        row |= _named(f"loss{name}", *ratio(sums[kept], sums["predicted"]))
    row |= _named("kl", *ratio(sums["kl_y"], sums["predicted"]))
    for name in ("zero", "mean"):
        ablated = sums[f"loss_{name}"]
        row |= _named(f"loss_recovered_{name}", *_share(ablated - sums["loss_y"], ablated - own))
        row |= _named(f"kl_recovered_{name}", *_share(sums[f"kl_{name}"] - sums["kl_y"], sums[f"kl_{name}"]))
    density = (one.active / sums["tokens"].sum()).cpu().numpy()
    counts, _ = np.histogram(np.log10(density[density > 0]).clip(EDGES[0]), EDGES)
    row |= {"dead": float((density == 0).mean()), "decoder_cosine": decoder_cosine(one.coder)}
    row["density"] = {"edges": EDGES.tolist(), "counts": counts.tolist()}
    return row | {"probing": one.probing.result() if one.probing else None}


def _named(name: str, value: float | None, error: float | None) -> dict[str, float | None]:
    return {name: value, f"{name}_error": error}


def _share(part: Float[np.ndarray, " d"], whole: Float[np.ndarray, " d"]) -> tuple[float | None, float | None]:
    """sum part / sum whole with its error; None where the ablation does no harm, so there is nothing to recover."""
    return ratio(part, whole) if whole.sum() > 0 else (None, None)


@torch.no_grad()
def decoder_cosine(coder: SparseCoder) -> float:
    """Mean over features of the largest cosine of its decoder row with another's."""
    rows = torch.nn.functional.normalize(coder.decoder, dim=1)
    largest = []
    for start in range(0, len(rows), ROWS):
        cosines = rows[start : start + ROWS] @ rows.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -1
        largest.append(cosines.amax(1))
    return float(torch.cat(largest).mean())
