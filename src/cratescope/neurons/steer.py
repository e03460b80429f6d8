"""Steering: edits of neurons while a model runs (paper section 7), and the units they may be given in.

An edit is a value. `steered` makes a list of them in every forward pass while it is open, in the order of the list,
each on what the ones before it left. The model itself is not changed. Features of a sparse autoencoder are edited by
the same values: the site says whether the edited code is written back as a difference or in place of the activation
(neurons/coded.py).

Where a token stands is known from what the pass is given: its attention mask and the length of its cache
(`Given` in neurons/sites.py). So it makes no difference whether `generate` uses a cache, or how a batch is padded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import read_json
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.records import NeuronRecord, layer_file, read_records
from cratescope.neurons.sites import Given, Site, hooked, noted
from cratescope.run import IDENTITY, Run

Operation = Literal["set", "add", "scale", "ablate", "cap"]
Unit = Literal["raw", "maximum", "quantile", "mean"]
Where = Literal["all", "prompt", "generated"]
QUANTILE = 0.999
"""What the unit `quantile` is: nearly a neuron's maximum, and not decided by a single token."""


@dataclass(frozen=True)
class Above:
    """A condition: neuron `index` of the same site is above `number`, at the same token.

    layer: that of the edit unless given, or one before it. A neuron of the same layer is looked at as the edits before
    this one leave it, one of a layer before as the edits of that layer leave it.
    """

    index: int
    number: float
    layer: int | None = None


@dataclass(frozen=True)
class Edit:
    """What to do to neuron `index` of a layer at a site.

    operation: `set` to `value`, `add` it, `scale` by it, `ablate` (to 0, or to the mean if that is the unit), or `cap`
    between `low` and `high`.
    unit: that of `value`, `low` and `high`: `raw` numbers, or multiples of the neuron's own maximum, 99.9 % quantile or
    mean, which records tell (`in_raw_units`). A factor of `scale` has none.
    where: `all` tokens, those of the `prompt`, the `generated` ones, or chosen positions counted from 0, the first
    that is no padding. when: a condition to be met besides.

    Raises:
        UserError: a number that is not finite, an index below 0, or parts that do not go together.
    """

    site: Site
    layer: int
    index: int
    operation: Operation
    value: float = 0.0
    unit: Unit = "raw"
    low: float = -math.inf
    high: float = math.inf
    where: Where | tuple[int, ...] = "all"
    when: Above | None = None

    def __post_init__(self) -> None:
        if reason := _refusal(self):
            raise UserError(f"edit of {self.name}: {reason}")

    @property
    def name(self) -> str:
        return f"{self.site.name}/{self.layer}:{self.index}"

    @property
    def in_raw(self) -> bool:
        return self.unit == "raw"

    def times(self, size: float) -> Edit:
        """The same edit in raw numbers, where its unit is `size`."""
        if self.operation == "ablate":
            return replace(self, operation="set", value=size, unit="raw")
        if self.operation == "cap":
            return replace(self, low=self.low * size, high=self.high * size, unit="raw")
        return replace(self, value=self.value * size, unit="raw")

    def applied(self, x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """What becomes of activations x of the neuron. UserError: a number beyond the range of their format."""
        largest = torch.finfo(x.dtype).max
        for number in (self.value, self.low, self.high):
            if math.isfinite(number) and abs(number) > largest:
                kind = str(x.dtype).removeprefix("torch.")
                raise UserError(f"edit of {self.name}: {number:g} is beyond the range of {kind}; give a smaller number")
        if self.operation == "add":
            return x + self.value
        if self.operation == "scale":
            return x * self.value
        if self.operation == "cap":
            return x.clamp(self.low, self.high)
        return torch.full_like(x, self.value)


def _refusal(edit: Edit) -> str | None:
    """Why there can be no such edit, if so."""
    cap, capped = edit.operation == "cap", (edit.low, edit.high) != (-math.inf, math.inf)
    if edit.operation not in get_args(Operation) or edit.unit not in get_args(Unit):
        return f"no {edit.operation!r} in unit {edit.unit!r}; there are {_listed(Operation)} in {_listed(Unit)}"
    if edit.layer < 0 or edit.index < 0:
        return "layers and neurons are counted from 0"
    if not math.isfinite(edit.value) or math.isnan(edit.low) or math.isnan(edit.high):
        return "its number is not finite; give a finite one"
    if cap and (edit.low > edit.high or not capped or math.inf in (edit.low, -edit.high) or edit.value):
        return f"cap takes low <= high, at least one of them, and no value, not {edit.low:g} and {edit.high:g}"
    if capped and not cap:
        return f"{edit.operation} takes a value; low and high are of cap"
    if edit.operation == "ablate" and (edit.value or edit.unit not in ("raw", "mean")):
        return "ablate takes no value, and as a unit only raw (to 0) or mean; use set"
    if edit.unit != "raw" and edit.operation == "scale" or edit.unit == "mean" and cap:
        return f"{edit.operation} takes no unit {edit.unit}; leave it out"
    return _refusal_of_place(edit)


def _refusal_of_place(edit: Edit) -> str | None:
    if isinstance(edit.where, tuple):
        if not edit.where or min(edit.where) < 0:
            return "name at least one position; they are counted from 0, the first token"
    elif edit.where not in get_args(Where):
        return f"no place {edit.where!r}; there are {_listed(Where)}, or positions"
    when = edit.when
    if when and (not math.isfinite(when.number) or when.index < 0 or not 0 <= (when.layer or 0) <= edit.layer):
        return "its condition needs a finite number, and a neuron of the same layer or one before it"
    return None


def _listed(kind: Any) -> str:
    return ", ".join(get_args(kind))


def in_raw_units(run: Run, edits: Iterable[Edit]) -> list[Edit]:
    """The same edits in raw numbers, by the run's records of each neuron.

    Raises:
        UserError: no records of that site, of this neuron or of this model; or a size that is 0, of which multiples
            mean nothing.
    """
    return [edit if edit.in_raw else edit.times(_size(edit, _record(run, edit))) for edit in edits]


def _record(run: Run, edit: Edit) -> NeuronRecord:
    check_records(run, edit.site, edit.layer)
    return read_records(layer_file(run.records(edit.site.name), edit.layer), [edit.index], strata=())[edit.index]


def check_records(run: Run, site: Site, layer: int | None = None) -> None:
    """Raise UserError unless the run has records of this site, and of this model and autoencoder of the layer."""
    folder = run.records(site.name)
    if not folder.is_dir():
        fix = f"run `cratescope collect {run.root} --site {site.name}`, or give a number without a unit"
        raise UserError(f"{folder}: no records, which a unit is measured by; {fix}")
    found = read_json(folder / "manifest.json", IDENTITY, "`cratescope collect`")["identity"]
    wanted: dict[str, Any] = {"site": site.pattern, "model_sha256": run.fingerprint()}
    same = all(found.get(name) == value for name, value in wanted.items())
    if isinstance(site, CodedSite) and layer is not None:
        same &= found.get("sae_sha256", {}).get(str(layer)) == site.identity.get(str(layer))
    if not same and "imported" not in found:
        raise UserError(f"{folder}: records of another model or site; delete it and run `cratescope collect`")


def _size(edit: Edit, record: NeuronRecord) -> float:
    """The size of an edit's unit in raw numbers."""
    if edit.unit == "mean":
        size = record.moments.mean
    else:
        size = record.moments.maximum if edit.unit == "maximum" else quantile(record)
    if not math.isfinite(size) or (edit.unit != "mean" and size <= 0):
        word = "99.9 % quantile" if edit.unit == "quantile" else edit.unit
        fix = "its maximum or " if edit.unit == "quantile" and record.moments.maximum > 0 else ""
        raise UserError(
            f"edit of {edit.name}: its {word} is {size:g} in the records; give multiples of {fix}raw numbers"
        )
    return size


def quantile(record: NeuronRecord) -> float:
    """The lower edge of the bin of the histogram in which the quantile lies: up to 1/16 of it below the exact one."""
    if record.histogram is None:
        neuron = record.neuron
        raise UserError(
            f"{neuron.site}/{neuron.layer}:{neuron.index}: its records have no histogram, which a quantile is read "
            "from; run `cratescope collect` with --strata, or give multiples of the maximum"
        )
    below = np.cumsum(record.histogram.count)
    return float(record.histogram.low[np.searchsorted(below, QUANTILE * below[-1])])


@contextlib.contextmanager
def steered(model: PreTrainedModel, edits: Iterable[Edit], prompt: int | None = None) -> Iterator[None]:
    """While open, every forward pass of the model runs with the edits made, those of `generate` too.

    prompt: tokens of the prompt, padding included (`input_ids.shape[1]`), which edits of the prompt or of generated
    tokens need. Padding is never edited where the attention mask shows it.

    Raises:
        UserError: a layer or neuron out of range, a site that can be read only, an edit that is not in raw numbers, or
            one of chosen tokens in a pass that does not tell which these are. What depends on the activations is
            raised in the forward pass.
    """
    edits = list(edits)
    for edit in edits:
        if not edit.in_raw:
            raise UserError(f"edit of {edit.name}: its unit is its {edit.unit}; turn it into numbers by in_raw_units")
        if prompt is None and edit.where in ("prompt", "generated"):
            raise UserError(f"edit of {edit.name}: give steered the length of the prompt, for edits of {edit.where}")
    seen: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(noted(model)) if edits else Given()
        for (_, site), group in itertools.groupby(_by_module(edits), lambda edit: (edit.layer, edit.site)):
            stack.enter_context(_edited(model, site, list(group), _Places(given, prompt, seen)))
        for edit in edits:
            if edit.when and edit.when.layer not in (None, edit.layer):
                stack.enter_context(_watched(model, edit, edit.when, seen))
        yield


def _by_module(edits: Sequence[Edit]) -> list[Edit]:
    """Sorted by what they read; between edits of one module the order stays, so that one pass of its coder does."""
    return sorted(edits, key=lambda edit: (edit.layer, edit.site.pattern))


@dataclass(frozen=True)
class _Places:
    """Where edits are made in the pass under way.

    seen: activations (b, t) of neurons of layers before, which conditions ask for, by the id of the edit.
    """

    given: Given
    prompt: int | None
    seen: Mapping[int, Tensor]

    def of(self, edit: Edit, x: Float[Tensor, "b t h"]) -> Bool[Tensor, "#b t"] | None:
        """Tokens of the activations x that this edit is made at; None for all of them."""
        masks = [self._chosen(edit), self._met(edit, x), self.given.real()]
        here = [mask.to(x.device) for mask in masks if mask is not None]
        return torch.stack(torch.broadcast_tensors(*here)).all(0) if here else None

    def _chosen(self, edit: Edit) -> Bool[Tensor, "#b t"] | None:
        if isinstance(edit.where, tuple):
            positions = self.given.positions()
            return torch.isin(positions, torch.tensor(edit.where, device=positions.device))
        if edit.where == "all" or self.prompt is None:
            return None
        return ((self.given.columns() < self.prompt) == (edit.where == "prompt"))[None]

    def _met(self, edit: Edit, x: Float[Tensor, "b t h"]) -> Bool[Tensor, "b t"] | None:
        if edit.when is None:
            return None
        if edit.when.layer in (None, edit.layer):
            return _column(x, edit.layer, edit.when.index) > edit.when.number
        return self.seen[id(edit)].to(x.device) > edit.when.number


@contextlib.contextmanager
def _edited(model: PreTrainedModel, site: Site, edits: Sequence[Edit], places: _Places) -> Iterator[None]:
    """While open, these edits of one site and layer are made."""

    def visit(layer: int, x: Tensor) -> Tensor:
        x = x.clone()
        for edit in edits:
            before = _column(x, layer, edit.index).clone()
            after, here = edit.applied(before), places.of(edit, x)
            x[..., edit.index] = after if here is None else torch.where(here, after, before)
        return x

    with hooked(model, site, [edits[0].layer], visit):
        yield


@contextlib.contextmanager
def _watched(model: PreTrainedModel, edit: Edit, when: Above, seen: dict[int, Tensor]) -> Iterator[None]:
    """While open, the neuron of a layer before that the edit waits for is kept in `seen`."""

    def visit(layer: int, x: Tensor) -> None:
        seen[id(edit)] = _column(x, layer, when.index)

    with hooked(model, edit.site, [when.layer or 0], visit):
        yield


def _column(x: Float[Tensor, "b t h"], layer: int, index: int) -> Float[Tensor, "b t"]:
    """The activations of one neuron. UserError: there is none of this index."""
    if index >= x.shape[-1]:
        raise UserError(f"neuron {index} is out of range; layer {layer} has {x.shape[-1]}")
    return x[..., index]
