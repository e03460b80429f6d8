"""Measurements of each run, read from its files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cratescope.arm import Arm
from cratescope.errors import UserError
from cratescope.explain.explained import Explained, Explanation
from cratescope.files import Shape, read_json, read_jsonl, slug
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import layer_file, layer_width, read_columns
from cratescope.neurons.sample import SAE
from cratescope.results.dictionaries import Dictionary, read_dictionaries
from cratescope.results.scores import Scores
from cratescope.run import IDENTITY, METRICS, Run
from cratescope.score.quality import read_quality
from cratescope.score.score import read_about

Row = dict[str, Any]
EVALUATION: Shape = {
    **{name: (float, None) for name in ("loss", "standard_error", "perplexity", "bits_per_byte", "unigram_entropy")},
    "examples?": [{"prompt": str, "top": [{"token": str, "probability": float, "logit?": float}], "continuation": str}],
}
"""What a report shows of evaluation.json."""
UNKNOWN: Row = dict.fromkeys(("split", "n_tokens", "loss", "standard_error", "perplexity", "bits_per_byte"))
UNKNOWN["unigram_entropy"] = None
SAMPLE = ("records.sample", "records.sample_seed")
"""How many units of a layer have records, and which: a mean over them estimates that over all."""
NEURONS = "neurons"
"""The same of imported records, which come without a model."""


@dataclass(frozen=True, eq=False)
class Activity:
    """How often (fraction of tokens) and how strongly each neuron of a layer was active on the collected text.

    width: how many neurons the layer has; those with records may be a sample of them.
    """

    index: Int[np.ndarray, " n"]
    density: Float[np.ndarray, " n"]
    maximum: Float[np.ndarray, " n"]
    width: int


@dataclass(frozen=True, eq=False)
class Results:
    """All measurements of one run at one site, except the windows of text.

    about: what `score` says of itself (explainer, simulator, sanity verdicts, what each explanation set was made with).
    explanations: texts by explanation set, layer and index. activity: by layer.
    quality: what `score` says of activation quality, if it does. dictionaries: of the run, whatever the site.
    """

    run: Run
    site: str
    label: str
    arm: Arm
    manifest: Row
    evaluation: Row
    metrics: list[Row]
    about: Row
    scores: Scores
    explanations: dict[str, dict[int, dict[int, str]]]
    activity: dict[int, Activity]
    quality: Row | None
    dictionaries: list[Dictionary]

    @cached_property
    def made_with(self) -> dict[str, dict[str, Any]]:
        """How each explanation set's records, explanations and simulations were made: `explanations.llm` and so on."""
        return {name: dict(_flat(self.about["made_with"][name])) for name in self.scores.sets}

    @property
    def plain(self) -> bool:
        """Whether the run is the paper's preset, read at its native site."""
        return self.site == self.arm.site and not self.arm.variant

    @property
    def features(self) -> bool:
        """Whether the site is the features of sparse autoencoders; they are scored exactly like neurons."""
        return self.site.startswith(SAE)

    @property
    def dictionary(self) -> Dictionary | None:
        """Whose features these are; None for neurons, and where the autoencoders are gone."""
        folder = self.run.saes(self.site.removeprefix(SAE)).name
        return next((one for one in self.dictionaries if self.features and one.name == folder), None)

    @property
    def units(self) -> str:
        """What is scored: `neurons` at the arm's native site, else the site."""
        return NEURONS if self.site == self.arm.site else self.site

    @property
    def side(self) -> str:
        """What a comparison goes by: the arm's name alone for its neurons, else `gpt2 + sae/bt16` and the like."""
        return self.arm.name if self.units == NEURONS else f"{self.arm.name} + {self.site}"

    @property
    def title(self) -> str:
        """The side as a reader knows it."""
        return self.arm.title if self.units == NEURONS else f"{self.arm.title} + {self.site}"

    def only(self, layers: Collection[int]) -> Results:
        """The same with the scores of some layers."""
        return self if {*self.scores.layers} <= {*layers} else replace(self, scores=self.scores.only(layers))

    @property
    def width(self) -> int:
        """Neurons per layer, with records or not."""
        return sum(activity.width for activity in self.activity.values()) // len(self.activity)

    @property
    def collected(self) -> int:
        """Neurons per layer that there are records of."""
        return sum(len(activity.index) for activity in self.activity.values()) // len(self.activity)

    @cached_property
    def matter(self) -> tuple[Any, ...]:
        """Properties two runs must share to be compared, besides their training: size, data, records, LLM."""
        # Scores by another language model or on other records are not comparable; the site differs by arm, and so may
        # the number of units that were drawn.
        made_with = tuple(
            (name, key, str(value))
            for name, settings in sorted(self.made_with.items())
            for key, value in settings.items()
            if not key.endswith("site") and key not in SAMPLE
        )
        run = self.manifest
        return run["n_layer"], self.arm.size, run["context"], run["data"]["manifest_sha256"], made_with

    def distinct(self, name: str, layer: int) -> int:
        """Number of different texts in the explanation set among the scored neurons of a layer."""
        scored = self.scores.scored(layer, name)
        texts = (text for index, text in self.explanations[name].get(layer, {}).items() if index in scored)
        return len({*texts} - {""})

    def densities(self, layer: int) -> list[float]:
        """Fraction of tokens on which each collected neuron is not zero, in index order; none of an unscored layer."""
        return self.activity[layer].density.tolist() if layer in self.activity else []


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names, without hashes and without the copy of the records' in the explanations'."""
    for name, value in settings.items():
        if name.endswith("sha256"):
            continue
        if isinstance(value, dict):
            if not (prefix and name == "records"):
                yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", Path(value).name if str(value).startswith("/") else value


def load_results(roots: Sequence[Path | str], explainer: str = "offline", simulator: str = "list-pmi") -> list[Results]:
    """Read run directories, one `Results` per run and scored site: of a run its neurons first, its features last.

    Raises:
        UserError: no run, two runs of one name, or a run whose records or scores are missing.
    """
    if not roots:
        raise UserError(
            "no run directory given; name at least one, such as `cratescope report runs/crate-2l --out report`"
        )
    runs = [Run(root) for root in roots]
    for name in (names := [run.name for run in runs]):
        if names.count(name) > 1:
            raise UserError(
                f"two run directories are called {name!r}; rename one, so that the report can tell them apart"
            )
    return [item for run in runs for item in sorted(_load_run(run, explainer, simulator), key=_place)]


def _place(item: Results) -> tuple[bool, bool, str]:
    return item.units != NEURONS, item.features, item.site


def _load_run(run: Run, explainer: str, simulator: str) -> Iterator[Results]:
    manifest = described(run)
    if not run.evaluation.exists() and run.manifest.exists():
        raise UserError(f"{run.evaluation}: no such file; run `cratescope evaluate {run.root}` first")
    _check_settings(run, manifest)
    folders = _scored(run, explainer, simulator)
    evaluation = read_json(run.evaluation, EVALUATION, "`cratescope evaluate`") if run.manifest.exists() else UNKNOWN
    metrics, dictionaries = _metrics(run, manifest), read_dictionaries(run)
    for site, folder in folders.items():
        about, scores = read_about(folder), Scores.read(folder)
        if not scores.protocols or about["made_with"].keys() != set(scores.sets):
            raise UserError(f"{folder}: its scores.json is not of its scores; run `cratescope score` again")
        site = _said_site(run, site, about)
        for name, made_with in about["made_with"].items():
            _check_made_with(folder, made_with, Explained(run, site, explainer, name).simulations(simulator).folder)
        quality = run.quality(site)
        yield Results(
            run=run,
            site=site,
            label=run.name if len(folders) == 1 and not site.startswith(SAE) else f"{run.name} · {site}",
            arm=Arm.of(manifest),
            manifest=manifest,
            evaluation=evaluation,
            metrics=metrics,
            about=about,
            scores=scores,
            explanations={name: _texts(Explained(run, site, explainer, name).explanations) for name in scores.sets},
            activity=_read_activity(run.records(site), scores.layers),
            quality=read_quality(quality) if quality.exists() else None,
            dictionaries=dictionaries,
        )


def _said_site(run: Run, folder: str, about: Row) -> str:
    """The site that a folder is named after; `sae/NAME` has lost its slash there, so its records are asked."""
    records = [made_with.get("records") for made_with in about["made_with"].values()]
    if not any(isinstance(one, dict) and "sae_sha256" in one for one in records):
        return folder
    table = read_columns(layer_file(run.records(folder), about["layers"][0]), ["site"])
    return table.column("site")[0].as_py()


def _metrics(run: Run, manifest: Row) -> list[Row]:
    """The log of a run's training, up to its last step.

    UserError: its end is missing; a cut at the end of a line would else pass for a shorter training.
    """
    rows = read_jsonl(run.metrics, METRICS, "`cratescope train`")
    steps, settings = manifest.get("steps", 0), manifest.get("settings", {})
    last = rows[-1]["step"] if rows else 0
    if settings.get("steps", steps) == steps:  # a training ends with a validation
        whole = not steps or (last == steps and "validation_loss" in rows[-1])
    else:  # a milestone
        whole = last >= steps - steps % settings.get("log_every", steps)
    if not whole:
        raise UserError(
            f"{run.metrics}: ends at step {last} of {steps}, so its end is lost; copy it again from where it was "
            "whole, or train the model again in another folder"
        )
    return rows


def _check_settings(run: Run, manifest: Row) -> None:
    """Refuse settings to show that are not those the run was trained with, where its manifest.json has these."""
    path = run.root / "manifest.json"
    if "settings" in manifest and path.exists():
        shown = manifest["settings"] | {"data_sha256": manifest["data"]["manifest_sha256"]}
        identity = read_json(path, IDENTITY, "`cratescope train`")["identity"]
        for name, value in identity.items():
            if shown.get(name) != value:
                said = f"says {name} = {shown.get(name)!r:.60} and {path} says {value!r:.60}"
                raise UserError(f"{run.manifest}: {said}, so one of them is damaged; put back the right one")


def _check_made_with(folder: Path, made_with: Row, simulations: Path) -> None:
    """Refuse scores that were not made from the simulations there are, as when these were made again since."""
    path = simulations / "manifest.json"
    if path.exists() and read_json(path, IDENTITY, "`cratescope simulate`")["identity"] != made_with:
        raise UserError(
            f"{folder / 'scores.json'}: is not of the simulations in {simulations}; run `cratescope score` again"
        )


def described(run: Run) -> Row:
    """Its run.json, or what stands for it where records were imported without a model. Errors as `read_manifest`."""
    return _imported(run) or run.read_manifest()


def _imported(run: Run) -> Row | None:
    """What stands for run.json of records that were imported; None for a run with a model."""
    found = sorted((run.root / "records").glob("[!.]*/manifest.json"))
    identity = read_json(found[0], IDENTITY, "`cratescope import`")["identity"] if found else {}
    if run.manifest.exists() or identity.get("imported") != "openai":
        return None
    layers = len(list(found[0].parent.glob("layer-*.parquet")))
    arm = Arm("imported", "unknown", "unknown", f"{layers}L", found[0].parent.name, None, None, run.name)
    data = {"path": str(identity["imported"]), "manifest_sha256": str(identity.get("sha256", ""))}
    return {"arm": arm.row(), "parameters": None, "n_layer": layers, "context": None, "data": data}


def _scored(run: Run, explainer: str, simulator: str) -> dict[str, Path]:
    """By site, the folder of scores of every site scored with the report's explainer and simulator."""
    folder, chosen = run.root / "scores", f"{slug(explainer)}/{slug(simulator)}"
    found = {site.name: site / chosen for site in sorted(folder.glob("*")) if (site / chosen / "scores.json").exists()}
    if found:
        return found
    others = sorted({"/".join(path.parts[-3:-1]) for path in folder.glob("*/*/*/scores.json")})
    hint = f" (scored so far, as explainer/simulator: {', '.join(others)})" if others else ""
    fix = f"run `cratescope score {run.root} --explainer {explainer} --simulator {simulator}` first"
    if by_another := [other for other in others if other.startswith(f"{slug(explainer)}/")]:
        fix += f", or give --simulator {by_another[0].partition('/')[2]}"
    raise UserError(f"{folder}/*/{chosen}/scores.json: no such file; {fix}{hint}")


def _texts(kept: Kept[Explanation]) -> dict[int, dict[int, str]]:
    """The text of every explanation, by layer and index."""
    found = {}
    for layer in kept.layers:
        table = kept.tables.read(layer, ["text"])
        found[layer] = dict(zip(*(table.column(name).to_pylist() for name in ("index", "text")), strict=True))
    return found


def _read_activity(folder: Path, layers: Iterable[int]) -> dict[int, Activity]:
    """Density and maximum of every neuron; only these columns are read, the windows are a thousand times larger."""
    found = {}
    for layer in layers:
        table = read_columns(path := layer_file(folder, layer), ["index", "density", "maximum"]).sort_by("index")
        index, density, maximum = (table.column(name).to_numpy() for name in table.column_names)
        found[layer] = Activity(index, density, maximum, layer_width(path))
    return found


def protocols(results: Sequence[Results]) -> list[str]:
    """Every protocol (or scorer) of any run, in the order of the runs."""
    return list(dict.fromkeys(name for item in results for name in item.scores.protocols))


def one_per_run(results: Sequence[Results]) -> list[Results]:
    """One entry per run, where a run was scored at several sites."""
    return list({item.run.root: item for item in reversed(results)}.values())[::-1]


def untrained_copy(item: Results, results: Sequence[Results]) -> Results | None:
    """The same arm with the same seed, not trained, among the runs; None for an untrained run itself."""

    def kind(one: Results) -> tuple[Any, ...]:
        return one.arm.preset, one.arm.name, one.arm.seed, one.site, one.matter

    copies = (other for other in results if other.arm.untrained and kind(other) == kind(item))
    return None if item.arm.untrained else next(copies, None)
