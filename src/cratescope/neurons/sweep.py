"""`cratescope steer --sweep`: what forcing a unit does, over strengths and beside controls (docs/steering.md)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import sha256, write_json
from cratescope.lm.load import data_of, load_model
from cratescope.locks import locked
from cratescope.models.folder import context_length, longest_context
from cratescope.neurons.coded import CodedSite, site_of
from cratescope.neurons.config import SteerConfig
from cratescope.neurons.continuations import continuations
from cratescope.neurons.curves import OWN, UNEDITED, Point, curves
from cratescope.neurons.directions import Readout, output_directions
from cratescope.neurons.outcomes import Aimed, FixedText, Writing
from cratescope.neurons.pushed import Pushes, Tail, module_of
from cratescope.neurons.records import NeuronId, layer_file, read_columns
from cratescope.neurons.sample import SAE, draw_neurons, record_files, records_identity
from cratescope.neurons.sites import Site
from cratescope.neurons.steer import check_records
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.tokenizer import encode

VERSION = 1
"""Of the curves: raise it when the same edits and texts give others."""
TRIAL_EDITS = 2
TOGETHER = 8
"""Units whose edits are made in the same passes."""
EXAMPLE_PROMPT = "1 2 3 4 5"
EXAMPLE_STRENGTH = 4
"""The paper's example (section 7): its prompt, and how far we force a neuron, in multiples of its maximum."""
SMALLEST = 1e-6
"""Norm of a direction that counts as none, relative to the largest of the layer."""


def sweep(config: SteerConfig) -> Path:
    """Write the curves of some units of every layer, and an example, and return their folder; finished units are kept.

    Raises:
        UserError: no records of this model and site, too little text, a strength or prompt that cannot be used, or
            curves of other settings in the folder.
    """
    work = Sweep.of(config)
    folder = curves_folder(config, work.site.name)
    claim(folder, work.identity())
    kept = curves(folder)
    with locked(folder, "sweep"), kept.writing() as keep:
        for layer in work.layers:
            units = work.units(layer)
            drawn, done = units.drawn(config.how.units), kept.done(layer)
            # Whole groups, also where some of one are there: the others of a unit's pass decide its last digits.
            groups = [drawn[start : start + TOGETHER] for start in range(0, len(drawn), TOGETHER)]
            groups = [group for group in groups if not done.issuperset(group)]
            for group in progress(groups, f"steer {work.run.name} {work.site.name} layer {layer}"):
                for points in work.measured(units, group):
                    if points[0].neuron.index not in done:
                        keep(points)
    _write_example(config, work, folder)
    return folder


def curves_folder(config: SteerConfig, site: str) -> Path:
    """Where the curves of a site are kept."""
    return Run(config.run).steering(site, replaced=config.sae == "replace" and site.startswith(SAE))


def sweep_one(config: SteerConfig, layer: int, index: int) -> list[Point]:
    """The curves of one unit, which are kept nowhere: chosen units are no sample. Errors as of `sweep`."""
    work = Sweep.of(dataclasses.replace(config, how=dataclasses.replace(config.how, layers=(layer,))))
    units = work.units(layer)
    if index not in units.maxima:
        raise UserError(
            f"{work.site.name}/{layer}:{index}: no record of such a unit that was ever active and writes something, so "
            "it has no maximum to be forced to multiples of; name another"
        )
    return next(work.measured(units, [index]))


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one layer that can be swept: active on some token, and writing something.

    own (m, d): what each writes to the residual stream per unit of activation; module (h, d): the same of the
    activations that the site is of. maxima: by index. order: in which they are drawn.
    """

    site: Site
    layer: int
    own: Float32[Tensor, "m d"]
    module: Float32[Tensor, "h d"]
    maxima: dict[int, float]
    order: list[int]

    def drawn(self, n: int) -> list[int]:
        return self.order[:n]

    def other(self, index: int) -> int:
        """The one that is drawn after this one."""
        return self.order[(self.order.index(index) + 1) % len(self.order)]

    def along(self, index: int) -> Float32[Tensor, " h"]:
        """A unit in the activations of the module: a feature's decoder row, or the axis of a neuron."""
        if isinstance(self.site, CodedSite):
            return self.site.coders[self.layer].decoder[index].detach().to(self.own)
        axis = torch.zeros(len(self.module)).to(self.own)
        axis[index] = 1
        return axis

    @cached_property
    def _inverse(self) -> Float32[Tensor, "d d"]:
        return torch.linalg.pinv((self.module.T @ self.module).double(), hermitian=True).to(self.module)

    def random(self, index: int, seed: int) -> Float32[Tensor, " h"]:
        """Activations that write a random direction; where they cannot write all, what is nearest."""
        drawn = np.random.default_rng([seed, self.layer, index]).standard_normal(self.own.shape[1])
        return self.module @ (self._inverse @ torch.from_numpy(drawn).to(self.own))

    def directions(self, index: int, seed: int) -> dict[str, Float32[Tensor, " h"]]:
        """By kind, what a change of the unit by 1 adds to the module's activations; all write the same norm."""
        own, norm = self.along(index), self.own[index].norm()
        controls = {"random": self.random(index, seed), "other": self.along(self.other(index))}
        matched = {kind: along * (norm / (along @ self.module).norm()) for kind, along in controls.items()}
        return {OWN: own, "flipped": -own} | matched


@dataclass(frozen=True, eq=False)
class Planned:
    """One edit of a unit before it is made; what is not said here is as of `Point`, `Pushes` and `Aimed`."""

    index: int
    kind: str
    strength: float
    value: float
    along: Float32[Tensor, " h"]
    written: Float32[Tensor, " d"]
    targets: Int64[Tensor, " k"]
    aims: Int64[Tensor, " k"]

    def point(self, model: str, units: Units, numbers: dict[str, float]) -> Point:
        """The same with what was measured."""
        return Point(
            NeuronId(model, units.site.name, units.layer, self.index),
            self.kind,
            self.strength,
            self.value,
            float(self.written.norm()),
            tuple(self.targets.tolist()),
            tuple(self.aims.tolist()),
            **numbers,
        )


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep's model, texts and settings."""

    config: SteerConfig
    run: Run
    model: PreTrainedModel
    site: Site
    layers: list[int]
    text: FixedText
    writing: Writing
    data_sha256: str

    @classmethod
    def of(cls, config: SteerConfig) -> Sweep:
        run, how = Run(config.run), config.how
        model = load_model(run, config.device)
        site = site_of(run, config.site, model, replace=config.sae == "replace")
        check_records(run, site)
        layers = list(record_files(run.records(site.name), how.layers))
        for layer in layers:
            check_records(run, site, layer)
        data = data_of(run, how.data)
        context = context_length(model.config, how.context)
        tokens = data.split("heldout").spaced(how.texts, context + 1).astype(np.int64)
        text = FixedText(model, torch.from_numpy(tokens).to(model.device))
        writing = Writing(model, _prompts(config, run, model), how.length, config.seed)
        _example_length(config, run, model)  # what could not be written is found before hours of work
        return cls(config, run, model, site, layers, text, writing, sha256(data.path / "manifest.json"))

    def identity(self) -> dict[str, Any]:
        how = dataclasses.asdict(self.config.how)
        for name in ("units", "layers", "data"):
            how.pop(name)
        about = {"version": VERSION, "seed": self.config.seed, "data_sha256": self.data_sha256}
        mode = {"sae": self.config.sae} if isinstance(self.site, CodedSite) else {}
        return records_identity(self.run, self.site.name) | about | mode | how

    @cached_property
    def readout(self) -> Readout:
        return Readout.of(self.model)

    @torch.no_grad()
    def units(self, layer: int) -> Units:
        own = output_directions(self.model, self.site, layer)
        module = output_directions(self.model, module_of(self.site), layer) if isinstance(self.site, CodedSite) else own
        path = layer_file(self.run.records(self.site.name), layer)
        table = read_columns(path, ["index", "maximum"])
        maxima = dict(zip(*(table.column(name).to_pylist() for name in ("index", "maximum")), strict=True))
        norms = own.norm(dim=1)
        writes = (norms > SMALLEST * norms.max()).tolist()
        maxima = {index: maximum for index, maximum in maxima.items() if maximum > 0 and writes[index]}
        order = [index for index in draw_neurons(path, self.config.how.neuron_seed, layer) if index in maxima]
        if len(order) < 2:
            raise UserError(f"{path}: fewer than two units that were ever active; collect more of --excerpts")
        return Units(self.site, layer, own, module, maxima, order)

    def measured(self, units: Units, indices: Sequence[int]) -> Iterator[list[Point]]:
        """The points of each of some units."""
        planned = [edit for index in indices for edit in self._planned(units, index)]
        aimed = self._aimed(units, planned)
        trial = aimed.pushes.only(slice(0, TRIAL_EDITS))
        tail = Tail(self.model, self.site, units.layer, self.text.tokens, self.text.last, trial)
        measured = self.text.measured(tail, aimed) | self.writing.measured(aimed)
        numbers = {name: values.tolist() for name, values in measured.items()}
        points = [
            edit.point(self.run.name, units, {name: values[place] for name, values in numbers.items()})
            for place, edit in enumerate(planned)
        ]
        for _, group in itertools.groupby(points, key=lambda point: point.neuron.index):
            yield list(group)

    @torch.no_grad()
    def _planned(self, units: Units, index: int) -> Iterator[Planned]:
        """The edits of a unit: every kind at every strength."""
        how = self.config.how
        found = units.directions(index, how.neuron_seed)
        written = {kind: along @ units.module for kind, along in found.items()}
        aims = dict(zip(found, self._top(torch.stack([*written.values()])), strict=True))
        for kind, along in found.items():
            for strength in how.strengths:
                value = strength * units.maxima[index]
                yield Planned(index, kind, strength, value, along, written[kind], aims[OWN], aims[kind])
        if isinstance(self.site, CodedSite) and self.site.replace:
            nothing = torch.zeros_like(found[OWN]), torch.zeros_like(written[OWN])
            yield Planned(index, UNEDITED, 0.0, 0.0, *nothing, aims[OWN], aims[OWN])

    def _aimed(self, units: Units, planned: Sequence[Planned]) -> Aimed:
        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(edit, name) for edit in planned])

        along = stacked("along")
        index = torch.tensor([edit.index for edit in planned], device=along.device)
        value = torch.tensor([edit.value for edit in planned], device=along.device)
        operation = self.config.how.operation
        pushes = Pushes(self.site, units.layer, index, value, along, stacked("written"), operation)
        return Aimed(pushes, stacked("targets"), stacked("aims"))

    def _top(self, directions: Float[Tensor, "n d"]) -> Int64[Tensor, "n k"]:
        """The tokens whose direct logits are the highest."""
        return self.readout.logits(directions).topk(self.config.how.targets).indices


def _prompts(config: SteerConfig, run: Run, model: PreTrainedModel) -> list[list[int]]:
    """Token ids of the neutral prompts. UserError: one is empty, or too long."""
    if not config.how.prefixes:
        raise UserError("--prefixes: name at least one text to write on from")
    found = [list(ids) for ids in encode(run.tokenizer, list(config.how.prefixes))]
    longest = longest_context(model.config)
    for text, ids in zip(config.how.prefixes, found, strict=True):
        if not ids:
            raise UserError(f"--prefixes {text!r}: has no token; give some text")
        if longest and len(ids) + config.how.length > longest:
            raise UserError(
                f"--prefixes {text!r:.40} of {len(ids)} tokens and --length {config.how.length} are more than the "
                f"{longest} tokens of this model; give fewer"
            )
    return found


def _example_length(config: SteerConfig, run: Run, model: PreTrainedModel) -> int:
    """Tokens to write in the example: as many as are asked for, or have room. UserError: no token, or no room."""
    [ids] = encode(run.tokenizer, [config.prompt or EXAMPLE_PROMPT])
    longest = longest_context(model.config)
    if not ids:
        raise UserError("--prompt: has no token; give some text")
    if longest and len(ids) >= longest:
        raise UserError(f"--prompt of {len(ids)} tokens is more than a model of {longest} can write on from; cut it")
    return min(config.tokens, longest - len(ids)) if longest else config.tokens


def _write_example(config: SteerConfig, work: Sweep, folder: Path) -> None:
    """The paper's example with the neuron that `example_unit` chooses, unless it is there."""
    path = folder / "example.json"
    if path.exists():
        return
    prompt = config.prompt or EXAMPLE_PROMPT
    layer, index = example_unit(work, prompt)
    site = f"{work.site.name}/" if isinstance(work.site, CodedSite) else ""
    edit = f"{site}{layer}:{index}={EXAMPLE_STRENGTH:g}x"
    tokens = _example_length(config, work.run, work.model)
    found = continuations(dataclasses.replace(config, prompt=prompt, edit=(edit,), tokens=tokens), work.run, work.model)
    write_json(path, dataclasses.asdict(found))


@torch.no_grad()
def example_unit(work: Sweep, prompt: str) -> tuple[int, int]:
    """Layer and index of the unit that, by the weights alone, raises the prompt's own tokens most.

    It is sought in the last layer, from which the direct path is all there is: of each unit's direct logits, in
    standard deviations from their mean, the mean over the prompt's different tokens is taken.
    """
    layer = work.layers[-1]
    units = work.units(layer)
    [ids] = encode(work.run.tokenizer, [prompt])
    tokens, known = torch.tensor(sorted(set(ids))), sorted(units.maxima)
    scores = []
    for logits in work.readout.blocks(units.own[known]):
        standard = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
        scores.append(standard[:, tokens.to(logits.device)].mean(1))
    return layer, known[int(torch.cat(scores).argmax())]
