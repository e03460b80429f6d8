"""One pass over held-out text: every neuron's top and random windows, moments and density.

The excerpts are cut into parts. Each part's statistics go into one file, and the parts are added up in order, so a
kill loses at most one part and the records are the same however the work was split.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cratescope.config import CollectConfig
from cratescope.lm.evaluate import data_of, load_model
from cratescope.neurons.records import (
    ActivationRecord,
    Moments,
    NeuronId,
    NeuronRecord,
    layer_file,
    write_records,
)
from cratescope.neurons.sites import Site, read_site, site_named
from cratescope.run import Run, UserError, atomic_path, claim, sha256


@dataclass(frozen=True)
class Plan:
    """What to keep of each neuron, and the random positions: `draws` (h, r) of n_excerpts x context positions.

    More positions are drawn than windows are wanted, because a window that overlaps one already taken is passed over.
    """

    top: int
    random: int
    window: int
    context: int
    draws: Int[np.ndarray, "h r"]

    @classmethod
    def of(cls, config: CollectConfig, layer: int, n_neurons: int, context: int) -> Plan:
        """The plan of a layer; the draws depend on (seed, layer) alone, not on batches or parts."""
        spare = config.random // 2 + 4 if config.random else 0
        generator = np.random.default_rng([config.seed, layer])
        draws = generator.integers(0, config.excerpts * context, size=(n_neurons, config.random + spare))
        return cls(config.top, config.random, min(config.window, context), context, draws)

    def start(self, position: Tensor) -> Tensor:
        """First token of the window of a position: half a window before it, moved inside the excerpt."""
        return (position - self.window // 2).clamp(0, self.context - self.window)


class LayerStatistics:
    """Streaming statistics of one layer over consecutive excerpts, starting empty.

    sums (4, h): sums of a, a^2, a^3, a^4 in float64. active (h,): tokens with a non-zero activation. maximum (h,).
    top_* (k, h[, w]): the k excerpts with the highest activation, highest first, ties by position.
    random_slot (m,): which of the plan's draws (flat index) were read so far; random_activations (m, w).
    """

    def __init__(self, plan: Plan, n_neurons: int) -> None:
        self.plan = plan
        self.n_tokens = torch.zeros(1, dtype=torch.int64)
        self.sums = torch.zeros(4, n_neurons, dtype=torch.float64)
        self.active = torch.zeros(n_neurons, dtype=torch.int64)
        self.maximum = torch.full((n_neurons,), -torch.inf)
        self.top_value = torch.zeros(0, n_neurons)
        self.top_excerpt = torch.zeros(0, n_neurons, dtype=torch.int64)
        self.top_position = torch.zeros(0, n_neurons, dtype=torch.int64)
        self.top_activations = torch.zeros(0, n_neurons, plan.window)
        self.random_slot = torch.zeros(0, dtype=torch.int64)
        self.random_activations = torch.zeros(0, plan.window)

    def update(self, activations: Float[Tensor, "b t h"], first_excerpt: int) -> None:
        """Add the next excerpts, numbered from `first_excerpt` on. Raises UserError for NaN, with its position."""
        activations = activations.detach().float().cpu()
        values, positions = activations.max(1).values, activations.argmax(1)
        if values.isnan().any():
            where = [int(i) for i in activations.isnan().nonzero()[0]]
            raise UserError(f"neuron {where[2]} is NaN at excerpt {first_excerpt + where[0]}, token {where[1]}")
        self.n_tokens += activations.shape[0] * activations.shape[1]
        self._add_sums(activations)
        self.maximum = torch.maximum(self.maximum, values.amax(0))
        # Windows are cut for the best k of this batch only; the others could not enter the list anyway.
        best = values.sort(dim=0, descending=True, stable=True).indices[: self.plan.top]
        positions, neurons = positions.gather(0, best), torch.arange(best.shape[1]).expand_as(best)
        windows = self._windows(activations, best, positions, neurons)
        self._merge_top(values.gather(0, best), best + first_excerpt, positions, windows)
        self._take_random(activations, first_excerpt)

    def merge(self, later: dict[str, Tensor]) -> None:
        """Add the `state` of the excerpts that follow."""
        self.n_tokens += later["n_tokens"]
        self.sums += later["sums"]
        self.active += later["active"]
        self.maximum = torch.maximum(self.maximum, later["maximum"])
        self._merge_top(*(later[f"top_{name}"] for name in ("value", "excerpt", "position", "activations")))
        self.random_slot = torch.cat([self.random_slot, later["random_slot"]])
        self.random_activations = torch.cat([self.random_activations, later["random_activations"]])

    def state(self) -> dict[str, Tensor]:
        """Everything but the plan, as tensors."""
        return {name: value.contiguous() for name, value in vars(self).items() if name != "plan"}

    def _add_sums(self, activations: Float[Tensor, "b t h"]) -> None:
        a = activations.flatten(0, 1).double()
        square = a * a
        self.sums += torch.stack([a.sum(0), square.sum(0), (square * a).sum(0), (square * square).sum(0)])
        self.active += (a != 0).sum(0)

    def _windows(self, activations: Tensor, excerpt: Tensor, position: Tensor, neuron: Tensor) -> Tensor:
        """Activations (..., w) of windows given by equal-shaped indices into (b, t, h)."""
        tokens = self.plan.start(position)[..., None] + torch.arange(self.plan.window)
        return activations[excerpt[..., None], tokens, neuron[..., None]]

    def _merge_top(self, value: Tensor, excerpt: Tensor, position: Tensor, activations: Tensor) -> None:
        """Keep the best k; a stable sort with the earlier excerpts first breaks ties by position."""
        values = torch.cat([self.top_value, value])
        order = values.sort(dim=0, descending=True, stable=True).indices[: self.plan.top]
        self.top_value = values.gather(0, order)
        self.top_excerpt = torch.cat([self.top_excerpt, excerpt]).gather(0, order)
        self.top_position = torch.cat([self.top_position, position]).gather(0, order)
        windows = torch.cat([self.top_activations, activations])
        self.top_activations = windows.gather(0, order[..., None].expand(-1, -1, windows.shape[-1]))

    def _take_random(self, activations: Float[Tensor, "b t h"], first_excerpt: int) -> None:
        b, t, _ = activations.shape
        draws = self.plan.draws
        slots = np.flatnonzero((draws >= first_excerpt * t) & (draws < (first_excerpt + b) * t))
        position = torch.from_numpy(draws.reshape(-1)[slots])
        neuron = torch.from_numpy(slots // draws.shape[1])
        windows = self._windows(activations, position // t - first_excerpt, position % t, neuron)
        self.random_slot = torch.cat([self.random_slot, torch.from_numpy(slots)])
        self.random_activations = torch.cat([self.random_activations, windows])

    def records(self, model: str, site: str, layer: int, excerpts: Int[np.ndarray, "n t"]) -> list[NeuronRecord]:
        """The records of all neurons; `excerpts` are the tokens that were read."""
        order = self.random_slot.argsort()
        drawn = self.random_activations[order].reshape(*self.plan.draws.shape, self.plan.window).numpy()
        draw_excerpt, draw_position = np.divmod(self.plan.draws, self.plan.context)
        top_excerpt, top_position = self.top_excerpt.numpy(), self.top_position.numpy()
        records = []
        for h in range(len(self.maximum)):
            firing = np.flatnonzero(self.top_value[:, h].numpy() > 0)
            top = self._windows_of(
                excerpts, top_excerpt[firing, h], top_position[firing, h], self.top_activations[firing, h].numpy()
            )
            candidates = self._windows_of(excerpts, draw_excerpt[h], draw_position[h], drawn[h])
            records.append(
                NeuronRecord(
                    NeuronId(model, site, layer, h),
                    tuple(top),
                    tuple(_disjoint(top, candidates, self.plan.random)),
                    _moments(int(self.n_tokens), self.sums[:, h].numpy(), float(self.maximum[h])),
                    density=float(self.active[h]) / int(self.n_tokens),
                )
            )
        return records

    def _windows_of(
        self,
        excerpts: Int[np.ndarray, "n t"],
        excerpt: Int[np.ndarray, " m"],
        position: Int[np.ndarray, " m"],
        activations: Float[np.ndarray, "m w"],
    ) -> list[ActivationRecord]:
        start = self.plan.start(torch.from_numpy(position)).numpy()
        return [
            ActivationRecord(excerpts[e, s : s + self.plan.window], a, int(e), int(s), int(p - s))
            for e, s, p, a in zip(excerpt, start, position, activations, strict=True)
        ]


def _disjoint(taken: list[ActivationRecord], candidates: list[ActivationRecord], n: int) -> list[ActivationRecord]:
    """The first `n` candidates that share no token with `taken` or with one another."""
    chosen: list[ActivationRecord] = []
    places: dict[int, list[ActivationRecord]] = {}
    for record in taken:
        places.setdefault(record.excerpt, []).append(record)
    for record in candidates:
        if len(chosen) == n:
            break
        here = places.setdefault(record.excerpt, [])
        if not any(record.overlaps(other) for other in here):
            here.append(record)
            chosen.append(record)
    return chosen


def _moments(n: int, sums: Float[np.ndarray, " 4"], maximum: float) -> Moments:
    """Central moments from power sums; a variance within rounding of zero is a constant neuron."""
    m1, m2, m3, m4 = sums / n
    variance = m2 - m1**2
    if variance <= 1e-12 * m2 or variance == 0:
        return Moments(n, float(m1), 0.0, None, None, maximum)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return Moments(n, float(m1), float(variance), float(third / variance**1.5), float(fourth / variance**2), maximum)


def collect(config: CollectConfig) -> Path:
    """Write one Parquet file of neuron records a layer and return their folder; finished layers are kept.

    Raises:
        UserError: no model or data, a context longer than the model's, too little text, records of another model.
    """
    run = Run(config.run)
    data = data_of(run, config.data)
    shape = AutoConfig.from_pretrained(run.trained_model())
    context = config.context or shape.max_position_embeddings
    if context > shape.max_position_embeddings:
        raise UserError(f"context = {context} is longer than the {shape.max_position_embeddings} tokens of this model")
    site = site_named(config.site, shape.model_type)
    folder = run.records(site.name)
    identity = _identity(config, run, site, context, sha256(data.path / "manifest.json"))
    layers = range(shape.num_hidden_layers)
    if all(layer_file(folder, layer).exists() for layer in layers):
        claim(folder, identity)
        shutil.rmtree(folder / ".parts", ignore_errors=True)
        return folder
    model = load_model(run, config.device)
    for layer in layers:
        site.module(model, layer)  # a wrong pattern is found before anything is written
    excerpts = data.split("heldout").spaced(config.excerpts, context)
    claim(folder, identity)
    _finish(config, run, site, _collect_parts(config, model, site, excerpts, folder / ".parts"), excerpts, folder)
    shutil.rmtree(folder / ".parts")
    return folder


def _identity(config: CollectConfig, run: Run, site: Site, context: int, data_sha256: str) -> dict[str, Any]:
    wanted = ("excerpts", "top", "random", "window", "part", "seed")
    settings = {name: getattr(config, name) for name in wanted}
    found = {"site": site.pattern, "context": context, "model_sha256": run.fingerprint(), "data_sha256": data_sha256}
    return settings | found


def _collect_parts(
    config: CollectConfig, model: PreTrainedModel, site: Site, excerpts: Int[np.ndarray, "n t"], folder: Path
) -> list[Path]:
    """Statistics of every part, one safetensors file each; whole files are kept."""
    starts = range(0, len(excerpts), config.part)
    paths = [folder / f"part-{number:05d}.safetensors" for number in range(len(starts))]
    work = [(start, path) for start, path in zip(starts, paths, strict=True) if not _readable(path)]
    console = Console(stderr=True)
    for start, path in track(work, f"collect {Run(config.run).name} {site.name}", console=console, transient=True):
        part = excerpts[start : start + config.part]
        state = _read_part(config, model, site, part, start)
        with atomic_path(path) as temporary:
            save_file(state, temporary)
    return paths


def _readable(path: Path) -> bool:
    try:
        return path.exists() and bool(load_file(path))
    except SafetensorError:
        path.unlink()
        return False


@torch.no_grad()
def _read_part(
    config: CollectConfig, model: PreTrainedModel, site: Site, part: Int[np.ndarray, "n t"], first: int
) -> dict[str, Tensor]:
    statistics: dict[int, LayerStatistics] = {}
    layers = range(model.config.num_hidden_layers)
    with read_site(model, site, layers) as activations:
        for start in range(0, len(part), config.batch_size):
            tokens = torch.from_numpy(part[start : start + config.batch_size]).to(model.device)
            model.base_model(tokens, use_cache=False)
            for layer in layers:
                n_neurons = activations[layer].shape[-1]
                if layer not in statistics:
                    plan = Plan.of(config, layer, n_neurons, part.shape[1])
                    statistics[layer] = LayerStatistics(plan, n_neurons)
                try:
                    statistics[layer].update(activations[layer], first + start)
                except UserError as error:
                    raise UserError(f"layer {layer}: {error}; the model is not usable, train it again") from error
    return {f"{layer}.{name}": value for layer, one in statistics.items() for name, value in one.state().items()}


def _finish(
    config: CollectConfig, run: Run, site: Site, parts: list[Path], excerpts: Int[np.ndarray, "n t"], folder: Path
) -> None:
    """Add up the parts of each layer, in order, and write its records."""
    layers = sorted({int(name.partition(".")[0]) for name in load_file(parts[0])})
    for layer in track(layers, f"records {run.name}", console=Console(stderr=True), transient=True):
        total = None
        for path in parts:
            state = {name.partition(".")[2]: x for name, x in load_file(path).items() if name.startswith(f"{layer}.")}
            n_neurons = len(state["maximum"])
            total = total or LayerStatistics(Plan.of(config, layer, n_neurons, excerpts.shape[1]), n_neurons)
            total.merge(state)
        assert total is not None
        write_records(layer_file(folder, layer), total.records(run.name, site.name, layer, excerpts))
