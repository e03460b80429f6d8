"""One pass over held-out text that records the neurons of a site, for all layers at once (docs/records.md).

The excerpts are cut into parts. Each part's statistics of each layer go into one file, and the files are added up in
order, so a kill loses at most one part and the records are the same however the work was split.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError, first_line
from cratescope.files import sha256
from cratescope.hardware import pick_device
from cratescope.lm.adopt import adopt, is_adopted
from cratescope.lm.load import data_of
from cratescope.locks import locked
from cratescope.models.folder import context_length, load_folder, model_config, skeleton
from cratescope.neurons.coded import CodedSite, site_of
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.merge import Totals, columns
from cratescope.neurons.records import layer_width, write_table
from cratescope.neurons.sample import Chosen
from cratescope.neurons.sites import Site, check_site, partial_pass, site_named, site_widths
from cratescope.neurons.strata import Pilot
from cratescope.neurons.streaming import LayerStatistics, Plan, refuse_not_finite
from cratescope.neurons.tensors import load_tensors, save_tensors
from cratescope.parts import layer_file, parts_folder, remove_parts
from cratescope.progress import progress, say
from cratescope.run import Run, claim
from cratescope.text.shards import TokenData
from cratescope.workers import rank, worker_of

TRIED = 2
"""Excerpts of the trial pass before anything is written."""
PILOT_TOKENS = 8192
"""Read beforehand, for thresholds."""
DUMP_BYTES = 8
"""Bytes of one activation in the sparse dump: neuron and value."""


def collect(config: CollectConfig) -> Path:
    """Write one Parquet file of neuron records per layer and return their folder; finished layers and parts are kept.

    Raises:
        UserError: no model or data, a context longer than the model's, too little text, a site that is not read once
            for every token, records of another model or sample, an activation that is not a number, or a disk too
            small.
    """
    _refuse_contradictions(config)
    run = Run(config.run)
    source = None if config.model is None or is_adopted(run, config.model) else config.model
    data = TokenData.open(config.data) if source and config.data else data_of(run, config.data)
    shape = model_config(source or run.trained_model())
    context = context_length(shape, config.context)
    worker, n_workers = worker_of(config.worker)
    blank = skeleton(shape)
    site = site_of(run, config.site, blank)
    layers = sorted(set(config.layers or site.layers(blank) or [0]))
    for layer in layers:
        site.module(blank, layer)  # a wrong pattern is found before anything is written
    folder = run.records(site.name)
    if not source and all(layer_file(folder, layer).exists() for layer in layers):
        chosen = _chosen(config, lambda: {layer: layer_width(layer_file(folder, layer)) for layer in layers})
        claim(folder, _identity(config, run, site, context, data, chosen))
        remove_parts(folder, layers)
        return folder
    if torch.cuda.is_available():
        torch.cuda.set_device(rank(local=True))
    excerpts = data.split("heldout").spaced(config.excerpts, context)
    excerpts = excerpts.astype(np.min_scalar_type(excerpts.max()))
    opened = partial(_opened, config, site, layers, excerpts[:TRIED])
    model = adopt(run, source, data, _native(blank, site), opened) if source else opened(run.trained_model())
    chosen = _chosen(config, lambda: _widths(model, site, layers, excerpts[:1]))
    claim(folder, _identity(config, run, site, context, data, chosen))
    left = [layer for layer in layers if not layer_file(folder, layer).exists()]
    work = Pass(config, model, site, left, excerpts, folder, chosen)
    with _full_disk(work), torch.inference_mode(), _locked(folder, left, f"{worker}-of-{n_workers}"):
        work.read(range(worker, work.n_parts, n_workers))
        if n_workers > 1 and (missing := work.missing()):
            say(f"worker {worker}: done; {missing} parts of other workers are missing still")
            return folder
        with locked(folder, "finish", wait=True):  # the last two workers may have finished together
            work.finish({"model": run.name, "site": site.name})
    return folder


def _refuse_contradictions(config: CollectConfig) -> None:
    if config.model is not None and config.data is None:
        raise UserError("--model needs --data: a folder that `cratescope prepare --tokenizer` made for that model")
    if config.dump and config.sample is not None:
        raise UserError("--dump writes the activations of all neurons; leave out --sample, or --dump")


@contextlib.contextmanager
def _locked(folder: Path, layers: Sequence[int], share: str) -> Iterator[None]:
    """Allow one process at a time per share of a layer; other layers and shares may be collected in parallel."""
    with contextlib.ExitStack() as locks:
        for layer in layers:
            locks.enter_context(locked(folder, f"layer-{layer:02d}-{share}"))
        yield


@contextlib.contextmanager
def _full_disk(work: Pass) -> Iterator[None]:
    """Tell the user what is kept when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        kept = work.n_parts - work.missing()
        raise UserError(
            f"disk full: {work.folder} keeps {kept} of {work.n_parts} parts and all finished layers; "
            "free some space and rerun the same command"
        ) from error


def _native(blank: PreTrainedModel, site: Site) -> str:
    """The site that `auto` names on this model; where there is none, the one that is read."""
    try:
        return site_named("auto", blank).name
    except UserError:
        return site.name


def _opened(
    config: CollectConfig, site: Site, layers: list[int], excerpts: Integer[np.ndarray, "n t"], folder: Path
) -> PreTrainedModel:
    """Load a folder's model for reading and try it on a few excerpts."""
    model: Any = load_folder(folder, config.dtype)  # Any: the library's own annotation of `to` takes no device
    model = model.to(pick_device(config.device)).eval()
    tokens = _tokens(model, excerpts)
    try:
        with torch.inference_mode():
            seen = check_site(model, site, layers, tokens)
    except UserError:
        raise
    except Exception as error:  # what a foreign model raises depends on its code
        raise UserError(
            f"a {model.config.model_type} model does not run on {tokens.shape[1]} tokens "
            f"({type(error).__name__}: {first_line(error)}); give another --context, --dtype or --device"
        ) from error
    for layer, activations in seen.items():
        with _named(layer, model.dtype):
            refuse_not_finite(activations.float(), 0)
    return model


def _tokens(model: PreTrainedModel, excerpts: Integer[np.ndarray, "n t"]) -> Int[Tensor, "n t"]:
    """As the model takes them."""
    return torch.from_numpy(excerpts.astype(np.int64)).to(model.device)


def _widths(
    model: PreTrainedModel, site: Site, layers: Sequence[int], excerpts: Integer[np.ndarray, "n t"]
) -> dict[int, int]:
    with torch.inference_mode():
        return site_widths(model, site, layers, _tokens(model, excerpts))


def _chosen(config: CollectConfig, widths: Callable[[], Mapping[int, int]]) -> dict[int, Chosen]:
    """The sample of every layer that has more neurons; `widths`, by layer, are asked for only where there is one."""
    n, seed = config.sample, config.sample_seed
    if n is None:
        return {}
    return {layer: Chosen.drawn(n, seed, layer, width) for layer, width in widths().items() if n < width}


def _identity(
    config: CollectConfig, run: Run, site: Site, context: int, data: TokenData, chosen: Mapping[int, Chosen]
) -> dict[str, Any]:
    wanted = ("excerpts", "top", "per_excerpt", "random", "window", "strata", "tokens", "dump", "part", "seed")
    settings = {name: getattr(config, name) for name in wanted}
    found = {"site": site.pattern, "context": context, "model_sha256": run.fingerprint()}
    found["data_sha256"] = sha256(data.path / "manifest.json")
    if isinstance(site, CodedSite):
        found["sae_sha256"] = {layer: sha256 for layer, sha256 in site.identity.items()}
    if chosen:
        found |= {"sample": config.sample, "sample_seed": config.sample_seed}
    return settings | found | ({} if config.dtype == "auto" else {"dtype": config.dtype})


@dataclass(frozen=True)
class Pass:
    """The work of collecting `layers` of a site; the files of its parts are in `folder`/.parts/<layer>.

    chosen: the neurons to record of each layer; all, where nothing is said of it.
    """

    config: CollectConfig
    model: PreTrainedModel
    site: Site
    layers: list[int]
    excerpts: Integer[np.ndarray, "n t"]
    folder: Path
    chosen: Mapping[int, Chosen] = field(default_factory=dict)

    @property
    def n_parts(self) -> int:
        return -(-len(self.excerpts) // self.config.part)

    @cached_property
    def plans(self) -> dict[int, Plan]:
        """One plan per layer, made from the pilot, which the first worker leaves for the others."""
        paths = {layer: self._file(layer, "pilot") for layer in self.layers}
        if any(load_tensors(path) is None for path in paths.values()):
            for layer, pilot in self._pilots().items():
                save_tensors(paths[layer], vars(pilot), first=True)
        loaded = {layer: load_tensors(path) or {} for layer, path in paths.items()}
        return {
            layer: Plan.of(self.config, layer, Pilot(**loaded[layer]), self.excerpts, self.chosen.get(layer))
            for layer in self.layers
        }

    @cached_property
    def _recorded(self) -> Site:
        """The site that is read: what is not recorded is left out as early as can be."""
        chosen = {layer: torch.from_numpy(one.index) for layer, one in self.chosen.items()}
        return self.site.only(chosen) if chosen else self.site

    def missing(self) -> int:
        """Number of parts that are missing or damaged."""
        return sum(not all(self._part(layer, part).exists() for layer in self.layers) for part in range(self.n_parts))

    def read(self, parts: Iterable[int]) -> None:
        """Write the statistics of these parts to files; good files are kept, damaged ones rewritten."""
        work = [(part, lacking) for part in parts if (lacking := self._lacking(part))]
        if not work:
            return
        statistics = {layer: LayerStatistics(plan) for layer, plan in self.plans.items()}
        if self.config.dump:
            self._check_room()
        label = f"collect {self.folder.parent.parent.name} {self.site.name}"
        for part, lacking in progress(work, label):
            self._read_part(part, {layer: statistics[layer] for layer in lacking})

    def finish(self, labels: dict[str, Any]) -> None:
        """Add up the parts of each layer, write its records, and delete the parts."""
        for layer in progress(self.layers, "records"):
            path = layer_file(self.folder, layer)
            try:
                if not path.exists():
                    totals, plan = Totals.of(self.plans[layer], self._shards(layer)), self.plans[layer]
                    found = columns(plan, totals, self.excerpts, labels | {"layer": layer})
                    write_table(path, found, plan.chosen.width)
            except UserError:
                if not path.exists():  # else another worker was faster and has deleted the parts
                    raise
        remove_parts(self.folder, self.layers)

    def _file(self, layer: int, name: str) -> Path:
        return parts_folder(self.folder, layer) / f"{name}.safetensors"

    def _part(self, layer: int, part: int) -> Path:
        return self._file(layer, f"part-{part:05d}")

    def _dump(self, layer: int, part: int) -> Path:
        return self.folder / "dump" / f"layer-{layer:02d}" / f"part-{part:05d}.safetensors"

    def _lacking(self, part: int) -> list[int]:
        """Layers for which this part is missing or damaged."""
        files = [self._part, *([self._dump] if self.config.dump else [])]
        return [layer for layer in self.layers if any(load_tensors(file(layer, part)) is None for file in files)]

    def _shards(self, layer: int) -> Iterator[dict[str, Tensor]]:
        for part in range(self.n_parts):
            shard = load_tensors(path := self._part(layer, part))
            if shard is None:
                raise UserError(f"{path}: damaged; rerun the same command, which reads that part again")
            yield shard
            del shard  # frees memory before the next one is read

    def _pilots(self) -> dict[int, Pilot]:
        """A few excerpts spread over the text, read one by one so that the batch size changes nothing."""
        n, context = self.excerpts.shape
        chosen = np.unique(np.linspace(0, n - 1, -(-PILOT_TOKENS // context)).astype(int)).tolist()
        found: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        index = {layer: one.index for layer, one in self.chosen.items()}

        def visit(layer: int, activations: Float[Tensor, "b t h"]) -> None:
            activations = activations.float().cpu()
            with _named(layer, self.model.dtype):
                refuse_not_finite(activations, excerpt, index.get(layer))
            found[layer].append(activations[0])

        with partial_pass(self.model, self._recorded, self.layers, visit) as run:
            for excerpt in chosen:
                run(self._tokens(excerpt, 1))
        return {layer: Pilot.of(torch.cat(parts)) for layer, parts in found.items()}

    def _read_part(self, part: int, statistics: dict[int, LayerStatistics]) -> None:
        first = part * self.config.part
        last = min(first + self.config.part, len(self.excerpts))
        dumps: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in statistics}

        def visit(layer: int, activations: Float[Tensor, "b t h"]) -> None:
            with _named(layer, self.model.dtype):
                statistics[layer].update(activations, tokens, start)
            if self.config.dump:
                dumps[layer].append(_non_zero(activations))

        with partial_pass(self.model, self._recorded, list(statistics), visit) as run:
            for start in range(first, last, self.config.batch_size):
                tokens = self._tokens(start, min(self.config.batch_size, last - start))
                run(tokens)
        for layer, one in statistics.items():
            if self.config.dump:
                joined = {name: torch.cat([piece[name] for piece in dumps[layer]]) for name in dumps[layer][0]}
                save_tensors(self._dump(layer, part), joined)
            save_tensors(self._part(layer, part), one.take_shard(first))

    def _tokens(self, start: int, n: int) -> Int[Tensor, "b t"]:
        return _tokens(self.model, self.excerpts[start : start + n])

    def _check_room(self) -> None:
        """Refuse a dump that would not fit on the disk."""
        active = sum(plan.pilot.active_per_token() for plan in self.plans.values())
        needed = self.excerpts.size * (active * DUMP_BYTES + 4 * len(self.layers))
        free = shutil.disk_usage(self.folder).free
        if needed > 0.9 * free:
            raise UserError(
                f"--dump needs about {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB free; "
                "free some space, or ask for fewer --excerpts or --layers"
            )


def _non_zero(activations: Float[Tensor, "b t h"]) -> dict[str, Tensor]:
    """Number of non-zero activations per token, with their neurons and values, in text order."""
    flat = activations.float().cpu().flatten(0, 1)
    token, neuron = flat.nonzero(as_tuple=True)
    counts = torch.bincount(token, minlength=len(flat))
    return {"counts": counts.int(), "neurons": neuron.int(), "values": flat[token, neuron]}


@contextlib.contextmanager
def _named(layer: int, dtype: torch.dtype) -> Iterator[None]:
    """Add to an error which layer it concerns, and the fix."""
    try:
        yield
    except UserError as error:
        name = str(dtype).removeprefix("torch.")
        fix = "the model is not usable, train it again" if name == "float32" else "collect again with --dtype float32"
        raise UserError(f"layer {layer}: {error} in {name}; {fix}") from error
