"""A run as the viewer sees it: its sites, and the columns of its tables that every page needs, read once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from cratescope.arm import Arm
from cratescope.errors import UserError, as_user_error
from cratescope.explain.controls import OWN, SHUFFLED
from cratescope.explain.explained import Explained
from cratescope.explain.protocols import PROTOCOLS
from cratescope.files import read_json, slug
from cratescope.neurons.effects import Effects, kept_effects
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import layer_width, read_columns
from cratescope.neurons.sample import SAE, record_files
from cratescope.results.runs import described
from cratescope.results.scores import measures_of
from cratescope.run import Run
from cratescope.score.scores import SCHEMA
from cratescope.score.scores import scores as scores_in

NUMBERS = ("density", "mean", "maximum", "kurtosis", "skewness")
"""Columns of numbers of the records that tables show."""
EFFECTS = ("direct_share", "input_score", "output_score")
"""Those of the effects."""
PRIMARY = "uniform"
"""The protocol that comes first where there is one: that of the report's primary measure."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one layer that there are records of, in index order.

    numbers: columns by name, NaN where there is no number. width: how many units the layer has.
    """

    index: Int[np.ndarray, " n"]
    numbers: Mapping[str, Float[np.ndarray, " n"]]
    dead: Bool[np.ndarray, " n"]
    width: int

    def __len__(self) -> int:
        return len(self.index)

    def place(self, index: int) -> int | None:
        """The row of a unit; None where it has no record."""
        place = int(np.searchsorted(self.index, index))
        return place if place < len(self) and self.index[place] == index else None

    def spread(self, index: Int[np.ndarray, " m"], values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
        """Values of some units as a column of all of them; NaN for the others."""
        found = np.full(len(self), np.nan)
        if len(self) and len(index):
            place = np.searchsorted(self.index, index).clip(max=len(self) - 1)
            there = self.index[place] == index
            found[place[there]] = values[there]
        return found


@dataclass(frozen=True)
class Measure:
    """What units are scored by: a protocol's own measure, of one explainer's explanations and one simulator."""

    explainer: str
    simulator: str
    protocol: str

    @property
    def name(self) -> str:
        return measures_of(self.protocol)[0]

    @property
    def source(self) -> str:
        return self.explainer if self.explainer == self.simulator else f"{self.explainer}, {self.simulator}"


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a layer by one measure, in the order of its units; NaN where there is none."""

    own: Float[np.ndarray, " n"]
    shuffled: Float[np.ndarray, " n"]

    @property
    def gain(self) -> Float[np.ndarray, " n"]:
        """The score over that of another unit's explanation."""
        return self.own - self.shuffled


class OpenedSite:
    """One site of a run that has records.

    folder: the name of its folder. name: as the records have it, with the slash of `sae/NAME`. damaged: what is wrong
    with files that cannot be read, by layer.
    """

    def __init__(self, run: Run, folder: str, native: str) -> None:
        self.run, self.folder = run, folder
        self.damaged: dict[int, str] = {}
        self._units: dict[int, Units] = {}
        self._scored: dict[tuple[Measure, int], Scored] = {}
        self._texts: dict[int, list[str]] = {}
        self._effects: dict[tuple[str, int], Float[np.ndarray, " n"]] = {}
        self.files = record_files(run.records(folder))
        for layer in self.files:
            try:
                self.units(layer)
            except UserError as error:
                self.damaged[layer] = str(error)
        if not self._units:
            raise UserError(next(iter(self.damaged.values())))
        first = read_columns(self.files[self.layers[0]], ["site"], whole=False)
        self.name = first.column("site")[0].as_py() if first.num_rows else folder
        self.native = self.name == native

    @property
    def layers(self) -> list[int]:
        """Those that can be read."""
        return [layer for layer in self.files if layer not in self.damaged]

    @property
    def coded(self) -> bool:
        """Whether its units are features of sparse autoencoders."""
        return self.name.startswith(SAE)

    @cached_property
    def collected(self) -> Mapping[str, Any]:
        """The manifest of its records; empty where there is none."""
        path = self.run.records(self.folder) / "manifest.json"
        found = read_json(path, {}, "`cratescope collect`") if path.exists() else {}
        return found

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its records were made from."""
        found = self.collected.get("identity")
        return found if isinstance(found, dict) else {}

    def file(self, layer: int) -> Path:
        if layer in self.damaged:
            raise UserError(self.damaged[layer])
        if layer not in self.files:
            known = ", ".join(map(str, self.files))
            raise UserError(f"layer {layer}: no such layer of {self.run.name} {self.name}; it has layers {known}")
        return self.files[layer]

    def units(self, layer: int) -> Units:
        """The numbers of a layer; the windows, a thousand times larger, are not read."""
        if layer not in self._units:
            path = self.file(layer)
            table = read_columns(path, ["index", *NUMBERS, "dead"], whole=False).sort_by("index")
            numbers = {name: table.column(name).to_numpy().astype(np.float64) for name in NUMBERS}
            index, dead = (table.column(name).to_numpy() for name in ("index", "dead"))
            self._units[layer] = Units(index, numbers, dead.astype(bool), layer_width(path, whole=False))
        return self._units[layer]

    @cached_property
    def measures(self) -> list[Measure]:
        """One per explainer and simulator that scored this site; the one with most units scored first."""
        folder = self.run.root / "scores" / self.folder
        found = {}
        for path in sorted(folder.glob("*/*/")):
            measure = self._measure(path)
            if measure is not None:
                found[measure] = sum(int((~np.isnan(self.scored(measure, layer).own)).sum()) for layer in self.layers)
        return sorted(found, key=lambda measure: (-found[measure], measure.source))

    def _measure(self, folder: Path) -> Measure | None:
        """What the scores in a folder are shown by."""
        kept = scores_in(folder)
        for layer in kept.layers:
            table = _read_scores(kept.tables.files(layer), ["protocol"], pc.field("control") == OWN)
            names = {*pc.unique(table.column("protocol")).to_pylist()}
            order = [PRIMARY, *PROTOCOLS, *sorted(names)]
            if names:
                return Measure(folder.parent.name, folder.name, next(name for name in order if name in names))
        return None

    def scored(self, measure: Measure, layer: int) -> Scored:
        """Own and control scores of a layer's units."""
        if (measure, layer) not in self._scored:
            self._scored[measure, layer] = self._read_scored(measure, layer)
        return self._scored[measure, layer]

    def _read_scored(self, measure: Measure, layer: int) -> Scored:
        units = self.units(layer)
        kept = scores_in(self.run.scores(self.folder, measure.explainer, measure.simulator))
        wanted = (pc.field("protocol") == measure.protocol) & (pc.field("measure") == measure.name)
        table = _read_scores(kept.tables.files(layer), ["index", "control", "value"], wanted)
        index, value = (table.column(name).to_numpy() for name in ("index", "value"))
        control = np.array(table.column("control").to_pylist(), dtype=object)
        own, shuffled = (units.spread(index[control == name], value[control == name]) for name in (OWN, SHUFFLED))
        return Scored(own, shuffled)

    @cached_property
    def effects(self) -> Kept[Effects]:
        """What its units do, where `cratescope effects` has measured it."""
        return kept_effects(self.run.effects(self.folder))

    def effect(self, name: str, layer: int) -> Float[np.ndarray, " n"]:
        """A number of the effects of a layer's units; NaN where there is none."""
        if (name, layer) not in self._effects:
            units = self.units(layer)
            table = self.effects.tables.read(layer, EFFECTS)
            index = table.column("index").to_numpy()
            for column in EFFECTS:
                values = table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
                self._effects[column, layer] = units.spread(index, values)
        return self._effects[name, layer]

    @cached_property
    def explainers(self) -> list[str]:
        folder = self.run.root / "explanations" / self.folder
        return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())

    def texts(self, layer: int) -> list[str]:
        """The first explanation of each unit of a layer; empty where there is none."""
        if layer not in self._texts:
            units = self.units(layer)
            found = [""] * len(units)
            for index, text in self._told(layer):
                place = units.place(index)
                if place is not None and text and not found[place]:
                    found[place] = text
            self._texts[layer] = found
        return self._texts[layer]

    def _told(self, layer: int) -> Iterator[tuple[int, str]]:
        """Every explanation of a layer, those that cards show first before others."""
        for explainer in self.explainers:
            for explained in Explained.every(self.run, self.folder, explainer):
                if layer in explained.explanations.layers:
                    table = explained.explanations.tables.read(layer, ["text"])
                    yield from zip(*(table.column(name).to_pylist() for name in ("index", "text")), strict=True)


def _read_scores(paths: Sequence[Path], columns: Sequence[str], wanted: pc.Expression) -> pa.Table:
    """Some rows of a layer's scores; row groups without them are left out."""
    tables = [SCHEMA.empty_table().select([*columns])]
    for path in paths:
        with as_user_error(f"{path}: damaged Parquet file", "delete it and run `cratescope score` again"):
            tables.append(pq.read_table(path, columns=[*columns], filters=wanted).replace_schema_metadata(None))
    tables[0] = tables[0].replace_schema_metadata(None)
    return pa.concat_tables(tables).combine_chunks()


class Opened:
    """One run: what it is, and its sites. A site that cannot be read is in `problems`, by the name of its folder."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.name.encode(errors="replace").decode()
        self.manifest = described(run)
        self.arm = Arm.of(self.manifest)
        self.problems: dict[str, str] = {}

    @cached_property
    def sites(self) -> dict[str, OpenedSite]:
        """By name: the arm's native site first, features of sparse autoencoders last."""
        folder = self.run.root / "records"
        names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
        found = []
        for name in names:
            try:
                found.append(OpenedSite(self.run, name, self.arm.site))
            except UserError as error:
                self.problems[name] = str(error)
            else:
                self.problems |= {f"{name} {layer}": told for layer, told in found[-1].damaged.items()}
        found.sort(key=lambda site: (not site.native, site.coded, site.name))
        return {site.name: site for site in found}

    def site(self, name: str) -> OpenedSite:
        """UserError: no records of it."""
        if name not in self.sites:
            if problem := self.problems.get(slug(name)):
                raise UserError(problem)
            known = ", ".join(self.sites) or "none"
            raise UserError(f"no site {name!r:.80} of {self.name}; it has records of {known}")
        return self.sites[name]

    @cached_property
    def life(self) -> list[Opened]:
        """Its milestones, the earliest first; one that cannot be read is left out."""
        found = []
        for path in sorted((self.run.root / "milestones").glob("step-*")):
            with contextlib.suppress(UserError):
                found.append(Opened(Run(path)))
        return found

    @cached_property
    def _vocabulary(self) -> Sequence[str] | None:
        """The text of every token id; None where the run has no tokenizer that can be read."""
        from cratescope.text.tokenizer import vocabulary_strings

        try:
            return vocabulary_strings(self.run.tokenizer)
        except (UserError, OSError, ValueError):
            return None

    @property
    def n_ids(self) -> int | None:
        """Token ids that have a text; None where there is no tokenizer."""
        return None if self._vocabulary is None else len(self._vocabulary)

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; its id where there is no tokenizer, empty where the tokenizer does not have it."""
        known = self._vocabulary
        if known is None:
            return [f"#{index}" for index in ids]
        return [known[index] if 0 <= index < len(known) else "" for index in ids]

    @property
    def recorded(self) -> bool:
        """Whether it has records of any site, without looking into them."""
        return any((self.run.root / "records").glob("[!.]*/layer-*.parquet"))

    @property
    def can_run(self) -> bool | str:
        """Whether its model can be run here, or why it cannot."""
        if not self.run.manifest.exists():
            return "these records were imported, without a model"
        if not (self.run.model / "model.safetensors").exists():
            return f"{self.name} has no model; copy its folder model from where it was trained"
        return True
