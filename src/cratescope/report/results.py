"""What was measured on each run, read from its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratescope.config import ReportConfig
from cratescope.neurons.protocols import PROTOCOLS
from cratescope.neurons.quality import read_quality
from cratescope.neurons.records import NeuronId, Score, layer_file, read_columns, read_explanations, read_scores
from cratescope.neurons.score import read_summary
from cratescope.report.text import finite
from cratescope.run import METRICS, Run, Shape, UserError, read_json, read_jsonl, slug

Row = dict[str, Any]
EVALUATION: Shape = {
    **{name: (float, None) for name in ("loss", "standard_error", "perplexity", "bits_per_byte", "unigram_entropy")},
    "examples?": [{"prompt": str, "top": [{"token": str, "probability": float, "logit?": float}], "continuation": str}],
}
"""What a report shows of evaluation.json."""

FAMILIES = {"crate": "CRATE", "gpt2": "GPT-2"}
NATIVE_SITES = {"codes", "mlp"}


@dataclass(frozen=True)
class Activity:
    """How often (fraction of tokens) and how strongly a neuron was active on the collected text."""

    density: float
    maximum: float


@dataclass(frozen=True, eq=False)
class Results:
    """All that was measured on one run at one site, except the windows of text.

    scores: by neuron, protocol, measure and control. quality: what `score` says of activation quality, if it does.
    """

    run: Run
    site: str
    label: str
    manifest: Row
    evaluation: Row
    metrics: list[Row]
    summary: Row
    scores: dict[tuple[NeuronId, str, str, str], Score]
    explanations: dict[NeuronId, str]
    activity: dict[NeuronId, Activity]
    quality: Row | None

    @property
    def family(self) -> str:
        return self.manifest["family"]

    @property
    def adopted(self) -> str | None:
        """The name of a model that was trained elsewhere: of its training nothing is known."""
        return self.manifest.get("adopted")

    @property
    def preset(self) -> str:
        return Path(self.adopted).name if self.adopted else self.manifest["preset"]

    @property
    def seed(self) -> int | None:
        return self.manifest.get("seed")

    @property
    def tokens_trained(self) -> int | None:
        return self.manifest.get("tokens_trained")

    @property
    def size(self) -> str:
        """The preset without its family: `2l` of `crate-2l`; the whole name of a model from elsewhere."""
        return self.preset if self.adopted else self.preset.rpartition("-")[2]

    @property
    def untrained(self) -> bool:
        return self.tokens_trained == 0

    @property
    def made_with(self) -> dict[str, Any]:
        """How records, explanations and simulations were made: `explanations.llm`, `records.excerpts` and so on."""
        return dict(_flat(self.summary.get("made_with", {})))

    @property
    def layers(self) -> list[int]:
        """The layers scored with any protocol."""
        return sorted({row["layer"] for protocol in self.summary["protocols"].values() for row in protocol["layers"]})

    @property
    def plain(self) -> bool:
        """Is it the preset as the paper has it, looked at where the paper looks?"""
        return self.site in NATIVE_SITES and not self.adopted and not self.manifest.get("settings", {}).get("crate")

    @property
    def matter(self) -> tuple[Any, ...]:
        """What two runs must have in common to be compared, besides their training: size, data, records, LLM."""
        # Scores by another language model or on other records are not comparable; the site differs by family.
        made_with = str([pair for pair in self.made_with.items() if not pair[0].endswith("site")])
        run = self.manifest
        return run["n_layer"], self.size, run["context"], run["data"]["manifest_sha256"], made_with

    def measure_of(self, protocol: str) -> str:
        """A protocol's own measure."""
        return self.summary["protocols"][protocol]["measure"]

    def score(self, neuron: NeuronId, protocol: str, control: str = "none", measure: str | None = None) -> Score | None:
        """A neuron's score by a protocol's own measure, or another one."""
        return self.scores.get((neuron, protocol, measure or self.measure_of(protocol), control))

    def values(
        self, protocol: str, control: str = "none", measure: str | None = None
    ) -> dict[int, dict[NeuronId, float]]:
        """Scores by layer and neuron, of those that have one."""
        measure = measure or self.measure_of(protocol)
        found: dict[int, dict[NeuronId, float]] = {}
        for (neuron, *key), score in self.scores.items():
            if key == [protocol, measure, control] and score.value is not None:
                found.setdefault(neuron.layer, {})[neuron] = score.value
        return found

    def densities(self, layer: int) -> list[float]:
        """Fraction of tokens on which each neuron of a layer is not zero, in index order."""
        return [self.activity[neuron].density for neuron in sorted(self.activity) if neuron.layer == layer]

    def ranking(self, protocol: str, layer: int) -> list[NeuronId]:
        """The neurons of a layer that have a score, best first; equal scores in index order."""
        values = self.values(protocol).get(layer, {})
        return sorted(values, key=lambda neuron: (-values[neuron], neuron))


def _flat(settings: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names, without hashes and without the copy of the records' in the explanations'."""
    for name, value in settings.items():
        if isinstance(value, dict):
            if not (prefix and name == "records"):
                yield from _flat(value, f"{prefix}{name}.")
        elif not name.endswith("sha256"):
            yield f"{prefix}{name}", Path(value).name if str(value).startswith("/") else value


def load_results(config: ReportConfig) -> list[Results]:
    """Read every run of the report, one `Results` a run and scored site.

    Raises:
        UserError: no run, two runs of one name, or a run whose evaluation, records or scores are missing.
    """
    if not config.runs:
        raise UserError(
            "no run directory given; name at least one, such as `cratescope report runs/crate-2l --out report`"
        )
    runs = [Run(path) for path in config.runs]
    for name in (names := [run.name for run in runs]):
        if names.count(name) > 1:
            raise UserError(
                f"two run directories are called {name!r}; rename one, so that the report can tell them apart"
            )
    return [item for run in runs for item in _load_run(run, config)]


def _load_run(run: Run, config: ReportConfig) -> list[Results]:
    manifest = run.read_manifest()
    if not run.evaluation.exists():
        raise UserError(f"{run.evaluation}: no such file; run `cratescope evaluate {run.root}` first")
    summaries = _summaries(run, config)
    evaluation = read_json(run.evaluation, EVALUATION, "`cratescope evaluate`")
    metrics = _metrics(run, manifest)
    found = []
    for path in summaries:
        site = path.parents[2].name
        summary = read_summary(path)
        _check_summary(path, summary)
        layers = {row["layer"] for protocol in summary["protocols"].values() for row in protocol["layers"]}
        quality = run.quality(site)
        found.append(
            Results(
                run=run,
                site=site,
                label=run.name if len(summaries) == 1 else f"{run.name} · {site}",
                manifest=manifest,
                evaluation=evaluation,
                metrics=metrics,
                summary=summary,
                scores=_by_neuron(read_scores(path.with_name("scores.jsonl"))),
                explanations=_texts(run, site, config.explainer, summary),
                activity=_read_activity(run.records(site), sorted(layers)),
                quality=read_quality(quality) if quality.exists() else None,
            )
        )
    return found


def _metrics(run: Run, manifest: Row) -> list[Row]:
    """The log of a run's training, up to its last step.

    Raises:
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


def explanation_set(summary: Row) -> str:
    """The explanations that a report shows: those of the first protocol scored."""
    return next(PROTOCOLS[name].explained for name in summary["protocols"] if name in PROTOCOLS)


def _texts(run: Run, site: str, explainer: str, summary: Row) -> dict[NeuronId, str]:
    found = read_explanations(run.explanations(site, explainer, explanation_set(summary)))
    return {neuron: item.text for neuron, item in found.items()}


def _check_summary(path: Path, summary: Row) -> None:
    if not summary["protocols"]:
        raise UserError(f"{path}: has no protocol; run `cratescope score` again")


def _summaries(run: Run, config: ReportConfig) -> list[Path]:
    """The summary.json of every site scored with the report's explainer and simulator."""
    folder = run.root / "scores"
    found = sorted(folder.glob(f"*/{slug(config.explainer)}/{slug(config.simulator)}/summary.json"))
    if found:
        return found
    missing = folder / "*" / slug(config.explainer) / slug(config.simulator) / "summary.json"
    command = f"cratescope score {run.root} --explainer {config.explainer} --simulator {config.simulator}"
    others = sorted({"/".join(path.parts[-3:-1]) for path in folder.glob("*/*/*/summary.json")})
    hint = f" (scored so far, as explainer/simulator: {', '.join(others)})" if others else ""
    raise UserError(f"{missing}: no such file; run `{command}` first{hint}")


def _by_neuron(scores: Iterable[Score]) -> dict[tuple[NeuronId, str, str, str], Score]:
    return {(item.neuron, item.protocol, item.measure, item.control): item for item in scores}


def _read_activity(folder: Path, layers: Sequence[int]) -> dict[NeuronId, Activity]:
    """Density and maximum of every neuron; only these columns are read, the windows are a thousand times larger."""
    found: dict[NeuronId, Activity] = {}
    for path in (layer_file(folder, layer) for layer in layers):
        table = read_columns(path, ["model", "site", "layer", "index", "density", "maximum"])
        for row in table.to_pylist():
            activity = Activity(row.pop("density"), row.pop("maximum"))
            found[NeuronId(**row)] = activity
    return found


def protocols(results: Sequence[Results]) -> list[str]:
    """Every protocol (or scorer) of any run, in the order the runs name them."""
    return list(dict.fromkeys(name for item in results for name in item.summary["protocols"]))


def one_per_run(results: Sequence[Results]) -> list[Results]:
    """One entry a run, where a run was scored at several sites."""
    return list({item.run.root: item for item in reversed(results)}.values())[::-1]


def untrained_copy(item: Results, results: Sequence[Results]) -> Results | None:
    """The same preset with the same seed, not trained, among the runs; None for an untrained run itself."""
    wanted = (item.preset, item.seed, item.site, item.manifest.get("settings", {}).get("crate"), item.matter)
    for other in results:
        found = (other.preset, other.seed, other.site, other.manifest.get("settings", {}).get("crate"), other.matter)
        if other.untrained and not item.untrained and found == wanted:
            return other
    return None


def finite_or_none(row: Row, *names: str) -> Row:
    """The named numbers of a row, None where they are not finite."""
    return {name: finite(row[name]) for name in names}
