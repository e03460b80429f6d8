"""Compare simulations and judgements with the truth: one row per neuron, protocol, control and measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.errors import UserError
from cratescope.explain.config import SCORERS
from cratescope.explain.controls import CONTROLS, OWN
from cratescope.explain.explained import Explained, Explanation, Judgement, Simulation
from cratescope.explain.judges import question_named
from cratescope.explain.protocols import ON_UNIFORM_TEXT, Protocol, Source, protocols_named
from cratescope.files import Shape, read_json, write_json
from cratescope.locks import locked
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import AT_ONCE, NeuronRecord, layer_file, read_records
from cratescope.neurons.sample import check_identity, find_site, records_identity
from cratescope.progress import progress
from cratescope.run import Run, made_from
from cratescope.score.config import ScoreConfig
from cratescope.score.inference import wilson
from cratescope.score.measures import WEIGHERS, bootstrap, judged, look_at_words, measure, reason
from cratescope.score.quality import write_quality
from cratescope.score.sanity import on_records
from cratescope.score.scores import Score, scores
from cratescope.score.words import Reader, Words, WordsOf, sources_read, words_for
from cratescope.text.tokenizer import vocabulary_strings

NO_TOKENIZER = "no tokenizer, so no words"
ONE_ANSWER = "windows of one kind only"
VERSION = 4
"""Of how scores are computed and named: raise it when the same simulations score otherwise."""
AGAIN = "delete the file and run `cratescope simulate` again"
SANITY_NEURONS = 64
"""At most so many neurons a layer in the sanity tests of the measures."""
ABOUT: Shape = {
    "explainer": str,
    "simulator": str,
    "site": str,
    "layers": [int],
    "sanity": [{"sample": str, "measure": str, "n_neurons": int, "missing": float, "extra": float, "passes": bool}],
    "made_with": {str: {}},
    "made_from": {str: str},
}
"""scores.json: what the rows beside it were made with and from, and which measures pass the sanity tests."""


@dataclass(frozen=True)
class ScoredSet:
    """An explanation set, what was simulated and judged from it, and how.

    judged: by scorer, where there is any. words: None without a tokenizer.
    """

    explained: Explained
    simulations: Kept[Simulation]
    judged: dict[str, Kept[list[Judgement]]]
    protocols: Sequence[Protocol]
    made_with: dict[str, Any]
    words: WordsOf | None


def score(config: ScoreConfig) -> Path:
    """Write a table of scores per layer, scores.json and the activation quality; return the folder.

    Scores are plain, not x100. scores.json says what they were made with and from, and which measures pass the sanity
    tests; means are taken by `cratescope.results`. Judgements by detection, fuzzing and intruder detection are scored
    too where there are any. Scores of the same tables and settings are kept.

    Raises:
        UserError: an unknown protocol; simulations that are missing, unfinished, of another model or explanation, or
            that do not fit the records.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    folder = run.scores(site, config.explainer, config.simulator)
    named = {
        Explained(run, site, config.explainer, chosen.name): protocols
        for chosen, protocols in protocols_named(config.protocols).items()
    }
    words = _words(run, config.explainer, [*named])
    sets = [_read(explained, config.simulator, protocols, words) for explained, protocols in named.items()]
    inputs = _made_from(run, site, config, sets)
    if run.quality(site).exists() and _finished(folder, inputs):
        return folder
    kept, sample = scores(folder), []
    layers = sorted({layer for one in sets for layer in one.simulations.layers})
    with locked(folder, "score", wait=True):  # all tables are of one process
        _remove_stale(kept, layers)
        for layer in layers:
            path = layer_file(run.records(site), layer)
            indices = _indices(sets, layer)
            work = progress(_layer_scores(path, layer, sets), f"score layer {layer}", len(indices))
            kept.replace(layer, work)
            sample += [*read_records(path, indices[:SANITY_NEURONS], _sources(sets)).values()]
        verdicts = on_records([protocol for one in sets for protocol in one.protocols], sample, words)
        write_quality(run, site, layers)
        about = {
            "explainer": config.explainer,
            "simulator": config.simulator,
            "site": site,
            "layers": layers,
            "sanity": [verdict.row() for verdict in verdicts],
            "made_with": {one.explained.set: one.made_with for one in sets},
            "made_from": inputs,
        }
        write_json(folder / "scores.json", about)
    return folder


def _words(run: Run, explainer: str, explained: Sequence[Explained]) -> WordsOf | None:
    """None for a run without a tokenizer; then measures that look at words have no value, for that reason."""
    if not _tokenizer_files(run):
        return None
    turns = {turn for one in explained if one.explanations.layers for turn in one.turns()}
    return words_for(explainer, Reader(vocabulary_strings(run.tokenizer)), turns)


def _tokenizer_files(run: Run) -> list[Path]:
    return sorted(path for pattern in ("*token*", "vocab*") for path in run.model.glob(pattern))


def _remove_stale(kept: Kept[list[Score]], layers: Sequence[int]) -> None:
    """Make the folder unfinished until all its tables are new, and free of layers that are no longer simulated."""
    (kept.folder / "scores.json").unlink(missing_ok=True)
    for layer in {*kept.layers} - {*layers}:
        layer_file(kept.folder, layer).unlink(missing_ok=True)


def _sources(sets: Sequence[ScoredSet]) -> set[Source]:
    return {source for one in sets for source in sources_read(one.explained.explainer, one.protocols)}


def _indices(sets: Sequence[ScoredSet], layer: int) -> list[int]:
    """Neurons of a layer that were simulated from any explanation set."""
    return sorted({index for one in sets for index in one.simulations.done(layer)})


def _finished(folder: Path, inputs: dict[str, str]) -> bool:
    """Whether scores were made from `inputs` and nothing has damaged them."""
    try:
        about = read_about(folder)
        for layer in about["layers"]:
            scores(folder).done(layer)
        return about["made_from"] == inputs
    except UserError:
        return False


def read_about(folder: Path) -> dict[str, Any]:
    """The scores.json of a folder whose tables are all there. UserError: a missing, damaged or older file."""
    path = folder / "scores.json"
    about = read_json(path, ABOUT, "`cratescope score`")
    if about["made_from"].get("version") != str(VERSION):
        raise UserError(f"{folder}: scored by another version of cratescope; run `cratescope score` again")
    for table in (layer_file(folder, layer) for layer in about["layers"]):
        if not table.exists():
            raise UserError(f"{table}: no such file; delete {path} and run `cratescope score` again")
    return about


def _made_from(run: Run, site: str, config: ScoreConfig, sets: Sequence[ScoredSet]) -> dict[str, str]:
    """Every file that decides a score; records and weights by what their manifests say."""
    every: list[Kept[Any]] = []
    for one in sets:
        every += [one.explained.explanations, one.simulations, *one.judged.values()]
    files = [kept.folder / "manifest.json" for kept in every]
    files += [path for kept in every for layer in kept.layers for path in kept.tables.files(layer)]
    files += _tokenizer_files(run)
    known = records_identity(run, site)
    return made_from(files, run.root, version=VERSION, site=site, protocols=config.protocols, records=known)


def _layer_scores(path: Path, layer: int, sets: Sequence[ScoredSet]) -> Iterator[list[Score]]:
    """The scores of each neuron of a layer, whose records are at `path`."""
    indices = _indices(sets, layer)
    for start in range(0, len(indices), AT_ONCE):
        chunk = indices[start : start + AT_ONCE]
        records = read_records(path, chunk, _sources(sets))
        found: dict[int, list[Score]] = {index: [] for index in chunk}
        for one in sets:
            for index, score in _set_scores(one, layer, chunk, records, len(sets) > 1):
                found[index].append(score)
        yield from found.values()


def _set_scores(
    one: ScoredSet, layer: int, chunk: Sequence[int], records: Mapping[int, NeuronRecord], several: bool
) -> Iterator[tuple[int, Score]]:
    """Scores of some neurons from one explanation set; `several` sets: the name of a scorer says which."""
    explained, simulated = one.explained.explanations.read(layer, chunk), one.simulations.read(layer, chunk)
    for index, simulation in simulated.items():
        where = f"{layer_file(one.simulations.folder, layer)}: neuron {index}"
        _check_text(where, explained.get(index), simulation)
        try:
            for protocol in one.protocols:
                for score in score_neuron(records[index], simulation, protocol, one.words):
                    yield index, score
        except ValueError as error:
            raise UserError(f"{where} {error}") from error
    for scorer, judged_by in one.judged.items():
        for index, items in judged_by.read(layer, chunk).items():
            where = f"{layer_file(judged_by.folder, layer)}: neuron {index}"
            for item in items:
                _check_judged(where, explained.get(index), item)
                name = one.explained.set
                for score in score_judgement(item, f"{scorer}-{name}" if several else scorer, name):
                    yield index, score


def _check_text(where: str, explanation: Explanation | None, simulation: Simulation) -> None:
    text = simulation.texts.get(OWN, "")
    unexplained = simulation.skipped is not None and not text
    if explanation is None or (explanation.text != text and not unexplained):
        raise UserError(f"{where} simulates another explanation than the one on file; run `cratescope simulate` again")


def _check_judged(where: str, explanation: Explanation | None, item: Judgement) -> None:
    if item.control == OWN and item.text and (explanation is None or explanation.text != item.text):
        raise UserError(f"{where} judges another explanation than the one on file; run `cratescope judge` again")


def score_neuron(
    record: NeuronRecord, simulation: Simulation, protocol: Protocol, words_of: WordsOf | None = None
) -> list[Score]:
    """Every measure of a protocol, on its windows joined together, for the neuron's own explanation and each control.

    The own explanation's scores by the protocol's own measure and by those ON_UNIFORM_TEXT have an interval. Without
    `words_of` the measures that look at words have no value.

    Raises:
        ValueError: a window of the protocol was not simulated, or with another number of tokens, or as NaN.
    """
    windows = protocol.windows(record)
    truth = np.concatenate([window.activations for window in windows]) if windows else np.zeros(0)
    number = np.repeat(np.arange(len(windows)), [len(window.activations) for window in windows])
    words = words_of(protocol, record) if words_of and look_at_words(protocol.measures) else None
    bounded, seed = (protocol.measures[0], *ON_UNIFORM_TEXT), (record.neuron.layer, record.neuron.index)
    found = []
    for control in (OWN, *(name for name in CONTROLS if name in simulation.expected)):
        simulated = _simulated(simulation, control, protocol, [window.key for window in windows])
        for name in protocol.measures:
            value, why = _value(name, truth, simulated, words, simulation.skipped)
            low, high = None, None
            if simulated is not None and value is not None and control == OWN and name in bounded:
                low, high = bootstrap(name, truth, simulated, number, seed, words=words) or (None, None)
            key = record.neuron, protocol.name, protocol.set.name, control, name
            found.append(Score(*key, value, len(truth), low, high, why))
    return found


def _value(
    name: str, truth: np.ndarray, simulated: np.ndarray | None, words: Words | None, skipped: str | None
) -> tuple[float | None, str | None]:
    """The value of a measure, or why there is none."""
    if words is None and name in WEIGHERS:
        return None, skipped or NO_TOKENIZER
    if simulated is None:  # as if the same were said of all tokens
        return None, skipped or reason(name, truth, np.zeros(len(truth)), words)
    value = measure(name, truth, simulated, words)
    return value, None if value is not None else skipped or reason(name, truth, simulated, words)


def _simulated(
    simulation: Simulation, control: str, protocol: Protocol, keys: Sequence[tuple[int, int, int]]
) -> np.ndarray | None:
    """The simulated activations of the windows joined together; None when there is no explanation to simulate."""
    if control not in simulation.expected or not keys:
        return None
    rows = simulation.expected[control]
    if len(rows) != len(simulation.keys):
        raise ValueError(f"control {control} has {len(rows)} windows where {len(simulation.keys)} are named; {AGAIN}")
    by_key = dict(zip(simulation.keys, rows, strict=True))
    missing = [key for key in keys if key not in by_key]
    if missing:
        raise ValueError(
            f"has no window (excerpt, start, width) {missing[0]} of protocol {protocol.name}; "
            "run `cratescope simulate` with the same --protocols first"
        )
    if any(len(by_key[key]) != key[2] for key in keys):
        raise ValueError(f"control {control} has a window with more or fewer values than tokens; {AGAIN}")
    values = np.array([value for key in keys for value in by_key[key]], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"control {control} has a value that is not a finite number; {AGAIN}")
    return values


def score_judgement(item: Judgement, protocol: str, name: str) -> list[Score]:
    """Accuracy and AUROC of yes-or-no answers; accuracy of groups is how often the right one was likeliest.

    Of texts that neurons were forced in the own explanation's accuracy has Wilson's interval; chance is 1 in a group.

    Raises UserError unless there are as many answers as labels, all of them probabilities.
    """
    labels, answers = np.array(item.labels, dtype=bool), np.array(item.probabilities, dtype=np.float64)
    if len(labels) != len(answers) or not ((answers >= 0) & (answers <= 1)).all():
        raise UserError(f"{protocol} of {item.neuron}: damaged judgements; run `cratescope judge` again")
    values = {name: judged(name, labels, answers) if len(labels) else None for name in ("accuracy", "auroc")}
    question, bounds = question_named(item.scorer), dict[str, tuple[float, float]]()
    if question.group > 1 and len(labels):
        groups = labels.reshape(-1, question.group), answers.reshape(-1, question.group)
        right = groups[0].argmax(1) == groups[1].argmax(1)
        values["accuracy"] = float(right.mean())
        if question.of_texts and item.control == OWN:
            bounds["accuracy"] = wilson(int(right.sum()), len(right))
    key, missing = (item.neuron, protocol, name, item.control), item.skipped or ONE_ANSWER
    found = []
    for by, value in values.items():
        low, high = bounds.get(by, (None, None))
        found.append(Score(*key, by, value, len(labels), low, high, missing if value is None else None))
    return found


def _read(explained: Explained, simulator: str, protocols: Sequence[Protocol], words: WordsOf | None) -> ScoredSet:
    """An explanation set and all that was made from it, checked to belong to this model's records."""
    made = explained.simulations(simulator)
    if not made.layers:
        raise UserError(
            f"{made.folder}: no simulations; run `cratescope simulate` with the same --protocols first, or name "
            "another --explainer or --simulator"
        )
    made_with = check_identity(made.folder, explained.origin)
    _check_finished(made)
    explained.identity()
    judged_by = {scorer: kept for scorer in SCORERS if (kept := explained.judgements(scorer)).layers}
    for kept in judged_by.values():
        check_identity(kept.folder, explained.origin)
    return ScoredSet(explained, made, judged_by, protocols, made_with, words)


def _check_finished(made: Kept[Simulation]) -> None:
    """Refuse simulations that are not of all neurons that were meant to be simulated."""
    path = made.folder / "plan.json"
    planned = read_json(path, {str: int}, "`cratescope simulate`") if path.exists() else {}
    for layer, wanted in planned.items():
        found = len(made.done(int(layer)))
        if found < wanted:
            raise UserError(
                f"{made.folder}: {found} of {wanted} neurons of layer {layer} are simulated; run the same "
                "`cratescope simulate` again to finish"
            )
