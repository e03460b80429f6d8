"""Predict a neuron's activations from a text alone: its explanation, and controls that say what a score is worth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.markup import escape
from rich.progress import track

from cratescope.errors import UserError
from cratescope.explain import prompts
from cratescope.explain.config import JudgeConfig, SimulateConfig
from cratescope.explain.explain import STDERR
from cratescope.explain.explained import Explanation, Simulation, Waiting, simulations
from cratescope.explain.explained import explanations as explanations_of
from cratescope.explain.protocols import PROTOCOLS, Protocol, protocols_named, scoring_windows
from cratescope.explain.shown import display, whole_word
from cratescope.explain.slots import value_choices
from cratescope.explain.wording import Wording, wording_named
from cratescope.files import read_json, write_json
from cratescope.llm.answers import REFUSED
from cratescope.llm.interface import LanguageModel, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.locks import locked
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import NeuronId, NeuronRecord, Window, layer_file
from cratescope.neurons.sample import (
    AT_ONCE,
    UNDECODABLE,
    check_identity,
    draw_neurons,
    find_site,
    records_identity,
    undecodable,
    with_records,
)
from cratescope.run import Run, claim
from cratescope.text.tokenizer import load_tokenizer, vocabulary_strings
from cratescope.workers import share

ITEMS = 3
"""list-pmi averages the distributions of this many list items, the first ones written greedily."""
THRESHOLD = 1.5
"""list-pmi: nats above the generic list below which a token counts as not meant."""
SMALLEST = 1e-5
"""list-pmi: probabilities below this are as good as none, so that rare words are not meant by chance."""
DECIMALS = 4
UNREAD = "a slot without a value"
ENOUGH = 4
"""So many neurons whose windows a server refuses, and no others, are no matter of single neurons."""
UNIGRAM_SHOWN = 8
"""How many tokens the text of the unigram control lists."""


class ListPMI:
    """A value for every word from what the LLM would list for an explanation, whatever stands around the word.

    value(word) = relu(log P(word | explanation) - mean over generic explanations of log P(word) - 1.5), P being the
    mean over the first three list items and 1e-5. A token has the value of the whole word it is part of, a word that of
    the first LLM token of its list item, a run of punctuation that of its likeliest sign.
    """

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._prefix = llm.encode(prompts.list_prefix())
        self._bullet = llm.encode(prompts.BULLET)
        self._known: dict[str, list[int]] = {}
        # The texts of one neuron are asked for on the same windows, one after the other.
        self._spelled: tuple[list[bytes], list[tuple[np.ndarray, np.ndarray]]] = ([], [])
        self._texts: list[str] = []
        self._tables: dict[str, Float[np.ndarray, " vocab"]] = {}
        self._generic = self._list_logprobs(prompts.GENERIC_EXPLANATIONS).mean(0)

    def plan(self, texts: Sequence[str]) -> None:
        """Say which texts may be asked for; they are computed in batches of this order whatever is asked first."""
        self._texts, self._tables = list(dict.fromkeys(texts)), {}

    def __call__(self, text: str, records: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        if text not in self._tables:
            start = self._texts.index(text) // self._batch * self._batch
            chunk = self._texts[start : start + self._batch]
            values = np.maximum(self._list_logprobs(chunk) - self._generic - THRESHOLD, 0)
            self._tables |= dict(zip(chunk, np.pad(values, ((0, 0), (0, 1))), strict=True))
        if self._spelled[0] != (windows := _tokens(records)):
            self._spelled = windows, [self._columns(record) for record in records]
        table = self._tables[text]
        return [np.maximum.reduceat(table[columns], starts) for columns, starts in self._spelled[1]]

    def _columns(self, record: Window) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " w"]]:
        """The LLM tokens that the tokens of a window may stand for, end to end, and where those of each token start.

        What is no text stands for the last column, of zeros.
        """
        tokens = [self._vocabulary[token] for token in record.tokens.tolist()]
        found = [self._items(whole_word(tokens, place)) for place in range(len(tokens))]
        starts = np.cumsum([0, *map(len, found[:-1])])
        return np.array([column for columns in found for column in columns]), starts

    def _items(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [self._llm.encode(item)[0] for item in prompts.list_items(word)] or [-1]
        return self._known[word]

    def _list_logprobs(self, texts: Sequence[str]) -> Float[np.ndarray, "n vocab"]:
        """log of SMALLEST + the mean over list items of P(token is the next item)."""
        asked = [self._llm.encode(prompts.list_prompt(text)) for text in texts]
        found = []
        for _ in range(ITEMS):
            logprobs = self._llm.next_logprobs(self._prefix, asked)
            found.append(logprobs)
            best = logprobs.argmax(1).tolist()
            asked = [[*ids, token, *self._bullet] for ids, token in zip(asked, best, strict=True)]
        mean = np.logaddexp.reduce(found, axis=0) - np.log(ITEMS)
        return np.logaddexp(mean, np.log(SMALLEST))


def _tokens(records: Sequence[Window]) -> list[bytes]:
    """Tells windows apart by their text: those of two neurons that were imported may have the same key."""
    return [record.tokens.tobytes() for record in records]


class ListInContext:
    """list-pmi, weighted by where a word stands: how much likelier the explanation makes it behind the words before it.

    value(token) = list-pmi value x exp(log P(token | explanation, text before) - log P(token | nothing said, text
    before)), the exponent held between -1 and 1. One forward pass a window and text.
    """

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._words = ListPMI(llm, vocabulary, batch)
        self._prefix = llm.encode(prompts.context_prefix())
        self._silent: tuple[list[bytes], list[Float[np.ndarray, " w"]]] = ([], [])

    def plan(self, texts: Sequence[str]) -> None:
        self._words.plan(texts)

    def __call__(self, text: str, records: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        words = self._words(text, records)
        if self._silent[0] != (windows := _tokens(records)):
            self._silent = windows, self._logprobs(prompts.EMPTY_EXPLANATION, records)
        told = self._logprobs(text, records)
        return [
            value * np.exp(np.clip(new - old, -1, 1))
            for value, new, old in zip(words, told, self._silent[1], strict=True)
        ]

    def _logprobs(self, text: str, records: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        """log P of each token's first piece behind the text before it."""
        asked = [
            prompts.context_prompt(self._llm, text, [self._vocabulary[token] for token in record.tokens])
            for record in records
        ]
        found = []
        for start in range(0, len(asked), self._batch):
            chunk = asked[start : start + self._batch]
            # A token that is no text has no piece of its own; whatever is read there, its value is 0 in any list.
            pieces = [[item.ids[min(slot, len(item.ids) - 1)] for slot in item.slots] for item in chunk]
            choices = sorted({piece for row in pieces for piece in row})
            slots = [item.slots for item in chunk]
            logprobs = self._llm.slot_logprobs(self._prefix, [item.ids for item in chunk], slots, choices)
            columns = {piece: column for column, piece in enumerate(choices)}
            for rows, row in zip(logprobs, pieces, strict=True):
                found.append(rows[np.arange(len(row)), [columns[piece] for piece in row]])
        return found


class AllAtOnce:
    """OpenAI's protocol: a value in the slot behind every token of a window, all in one forward pass.

    expected value = sum of v P(v) / sum of P(v) over the values v = 0..10. P(10) is that of its whole spelling, also
    where the tokenizer splits it; then P(1) is that of a 1 with no 0 behind it. `quirks` reads like the reference code.
    """

    def __init__(
        self, llm: LanguageModel, vocabulary: Sequence[str], batch: int, wording: Wording, quirks: bool = False
    ) -> None:
        self._llm, self._batch, self._vocabulary, self._wording = llm, batch, vocabulary, wording
        self._read = TopFive(llm) if quirks else AllValues(llm)
        self._prefix = wording.slots_prefix(llm)

    def plan(self, texts: Sequence[str]) -> None:
        """Nothing to share between texts: every window is its own prompt."""

    def __call__(self, text: str, records: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        asked = [
            self._wording.slot_prompt(self._llm, text, [self._vocabulary[token] for token in record.tokens])
            for record in records
        ]
        if any(len(item.slots) != len(record.tokens) for item, record in zip(asked, records, strict=True)):
            raise AssertionError("a slot for every token")
        found = []
        for start in range(0, len(asked), self._batch):
            chunk = asked[start : start + self._batch]
            ids, slots = [item.ids for item in chunk], [item.slots for item in chunk]
            found += self._llm.slot_logprobs(self._prefix, ids, slots, self._read.choices)
        return [self._read(logprobs) for logprobs in found]


class AllValues:
    """Reads the expected value off the log-probabilities of all values 0..10."""

    def __init__(self, llm: LanguageModel) -> None:
        self.choices = value_choices(llm)
        self._split = len(self.choices[-1]) > 1

    def __call__(self, logprobs: Float[np.ndarray, "w choices"]) -> Float[np.ndarray, " w"]:
        return expected_value(logprobs, self._split)


def expected_value(logprobs: Float[np.ndarray, "w values"], split: bool = False) -> Float[np.ndarray, " w"]:
    """Mean of the values 0..10 weighted by their probabilities; `split`: what is given for 1 may go on to be a 10.

    NaN where no value has a probability (a server names the likeliest tokens only).
    """
    with np.errstate(invalid="ignore"):
        weights = np.exp(logprobs - logprobs.max(1, keepdims=True))
    if split:
        weights[:, 1] = np.maximum(weights[:, 1] - weights[:, -1], 0)
    return (weights @ np.arange(weights.shape[1])) / weights.sum(1)


class TopFive:
    """Reads as the reference code does: only values among the five likeliest tokens, and 10 as 1 where it is split."""

    def __init__(self, llm: LanguageModel) -> None:
        self.choices = range(llm.next_logprobs([], [llm.encode("0")]).shape[1])
        values = value_choices(llm)
        self._columns = [ids[0] for ids in values if len(ids) == 1]

    def __call__(self, logprobs: Float[np.ndarray, "w vocab"]) -> Float[np.ndarray, " w"]:
        fifth = np.partition(logprobs, -5, axis=1)[:, -5:].min(1, keepdims=True)
        weights = np.where(logprobs >= fifth, np.exp(logprobs), 0)[:, self._columns]
        return (weights @ np.arange(len(self._columns))) / np.maximum(weights.sum(1), 1e-30)


Simulator = ListPMI | ListInContext | AllAtOnce


def simulate(config: SimulateConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write simulations of every explained neuron and return the folder of each explanation set.

    A neuron without an explanation has the controls that need none. What is finished is kept; a neuron is simulated
    again when its texts are no longer the planned ones (more neurons were explained, so the shuffled control's
    partner may be another), or when a protocol asks for windows it does not have.

    Raises:
        UserError: no such site, protocol or explanations; or a folder holds simulations of something else.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    chosen = protocols_named(config.protocols)
    return [_simulate_set(config, run, site, explained, chosen[explained], llm) for explained in chosen]


def _simulate_set(
    config: SimulateConfig,
    run: Run,
    site: str,
    explained: str,
    protocols: Sequence[Protocol],
    llm: LanguageModel | None,
) -> Path:
    layers, identity = explained_layers(config, run, site, explained)
    folder = run.simulations(site, config.explainer, config.simulator, explained)
    known = records_identity(run, site) | llm_identity(config.llm, llm) | {"explanations": identity}
    neurons = {layer: len(explanations[: config.neurons]) for layer, explanations in layers.items()}
    begin = functools.cache(functools.partial(_begin, folder, known | made_with(config), neurons))
    if (folder / "manifest.json").exists():
        begin()
    tokenizer = load_tokenizer(run.model)
    vocabulary = vocabulary_strings(tokenizer)
    kept = simulations(folder)
    simulator: Simulator | None = None
    with kept.writing() as keep:

        def begin_and_keep(simulation: Simulation) -> None:
            begin()  # not before: a model or server that gives no answer leaves no folder
            keep(simulation)

        waiting = Waiting(begin_and_keep, ENOUGH)
        for layer, explanations in layers.items():
            pairs = own_share(config, explanations)
            pending = _tasks(layer_file(run.records(site), layer), pairs, protocols, vocabulary, kept, layer)
            if (first := next(pending, None)) is None:
                continue
            simulator = simulator or make_simulator(config, llm or open_llm(config.llm), vocabulary)
            simulator.plan([prompts.EMPTY_EXPLANATION, *(item.text for item in explanations if item.text)])
            work = itertools.chain([first], pending)
            label = escape(f"simulate {run.name} layer {layer}")
            for task in track(work, label, len(pairs), console=STDERR, transient=True):
                simulated, refused = task.simulate(simulator, config.simulator)
                waiting.answered |= not refused and bool(task.texts.keys() - {"unigram"})
                waiting.add(simulated, refused)
        waiting.end(functools.partial(_any_simulated, kept))
    return folder


def _tasks(
    path: Path,
    pairs: Sequence[tuple[Explanation, str]],
    protocols: Sequence[Protocol],
    vocabulary: Sequence[str],
    kept: Kept[Simulation],
    layer: int,
) -> Iterator[Task]:
    """What is left to do of a worker's share of a layer, whose records are at `path`."""
    by_index = {own.neuron.index: (own, null) for own, null in pairs}
    chunks = [[*by_index][start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]
    for chunk, records in with_records(path, chunks, 1):
        found = kept.read(layer, chunk)
        for index in chunk:
            own, null = by_index[index]
            task = Task.of(own, null, records[index], protocols, vocabulary, found.get(index))
            if not task.done:
                yield task


def _any_simulated(kept: Kept[Simulation]) -> bool:
    return any(item.expected.keys() - {"unigram"} for _, item in kept.all())


def _begin(folder: Path, identity: dict[str, Any], neurons: dict[int, int]) -> None:
    claim(folder, identity)
    _plan(folder, neurons)


def _plan(folder: Path, neurons: dict[int, int]) -> None:
    """Write how many neurons a layer are wanted, so that `score` can tell a killed run from a smaller --neurons."""
    path = folder / "plan.json"
    with locked(folder, "plan", wait=True):
        planned = read_json(path, {str: int}, "`cratescope simulate`") if path.exists() else {}
        wanted = planned | {str(layer): max(n, planned.get(str(layer), 0)) for layer, n in neurons.items()}
        if wanted != planned:
            write_json(path, wanted)


def made_with(config: SimulateConfig) -> dict[str, Any]:
    """What decides a simulation beside the texts and the model."""
    if config.simulator != "all-at-once":
        names = {"list-pmi": prompts.LIST_PROMPT, "list-in-context": f"{prompts.LIST_PROMPT}, {prompts.CONTEXT_PROMPT}"}
        constants = {"items": ITEMS, "threshold": THRESHOLD, "smallest": SMALLEST}
        return {"prompt": names[config.simulator], "scale": "nats"} | constants
    wording = wording_named(config.prompts)
    return {"prompt": wording.slots_version, "scale": "0-10", "reference_quirks": config.reference_quirks}


def make_simulator(config: SimulateConfig, llm: LanguageModel, vocabulary: Sequence[str]) -> Simulator:
    """The simulator named by the settings; `vocabulary` is the text of every token of the neurons' model."""
    if config.simulator == "list-pmi":
        return ListPMI(llm, vocabulary, config.llm.llm_batch)
    if config.simulator == "list-in-context":
        return ListInContext(llm, vocabulary, config.llm.llm_batch)
    wording = wording_named(config.prompts)
    return AllAtOnce(llm, vocabulary, config.llm.llm_batch, wording, config.reference_quirks)


def explained_layers(
    config: SimulateConfig | JudgeConfig, run: Run, site: str, explained: str
) -> tuple[dict[int, list[Explanation]], dict[str, Any]]:
    """Every layer's explanations in the order in which neurons were drawn, and what they were made from.

    Raises:
        UserError: there are none, they belong to another model, or --neurons asks for none.
    """
    if config.neurons is not None and config.neurons < 1:
        raise UserError(f"--neurons {config.neurons}: give a number of 1 or more")
    folder = run.explanations(site, config.explainer, explained)
    found = dict(explanations_of(folder).all())
    if not found:
        raise UserError(
            f"{folder}: no explanations; run `cratescope explain` with the same --protocols first, or name another "
            "--explainer"
        )
    identity = check_identity(folder, records_identity(run, site))
    layers: dict[int, list[Explanation]] = {}
    for neuron, explanation in found.items():
        layers.setdefault(neuron.layer, []).append(explanation)
    for layer, explanations in layers.items():
        drawn = draw_neurons(layer_file(run.records(site), layer), identity["neuron_seed"], layer)
        by_index = {item.neuron.index: item for item in explanations}
        layers[layer] = [by_index[index] for index in drawn if index in by_index]
    return layers, identity


def own_share(
    config: SimulateConfig | JudgeConfig, explanations: Sequence[Explanation]
) -> list[tuple[Explanation, str]]:
    """This worker's part of the first --neurons of a layer, each with the wrong explanation it is compared with."""
    pairs = list(zip(explanations, null_texts(explanations), strict=True))[: config.neurons]
    return share(pairs, config.worker, config.llm.llm_batch)


def null_texts(explanations: Sequence[Explanation]) -> list[str]:
    """For every explanation the nearest different one before it, going round: another neuron's, never its own text.

    The order is the random one in which neurons were drawn, so this is a seeded pairing that needs no draw of its own.
    Empty for a neuron without an explanation, and where the whole layer has one text only.
    """
    found, last, other = [], "", ""
    for item in (*explanations, *explanations):
        found.append("" if not item.text else last if last != item.text else other)
        if item.text and item.text != last:
            last, other = item.text, last
    return found[len(explanations) :]


@dataclass(frozen=True)
class Task:
    """What is to be kept of one neuron: `texts` by control, each simulated on `windows`. found: what is kept so far.

    possible: windows that other protocols of the same explanation set would score on; what is there of them is kept.
    means: mean activation of each token in the windows explained from, the unigram control.
    """

    neuron: NeuronId
    texts: dict[str, str]
    windows: tuple[Window, ...]
    possible: tuple[Window, ...]
    means: dict[int, float]
    skipped: str | None
    found: Simulation | None = None

    @classmethod
    def of(
        cls,
        explanation: Explanation,
        null_text: str,
        record: NeuronRecord,
        protocols: Sequence[Protocol],
        vocabulary: Sequence[str],
        found: Simulation | None = None,
    ) -> Task:
        shown = protocols[0].explain_records(record)
        windows = tuple(scoring_windows(protocols, record))
        skipped = explanation.skipped
        if undecodable((*shown, *windows), len(vocabulary)):
            skipped = UNDECODABLE
        if record.dead or skipped == UNDECODABLE:
            return cls(explanation.neuron, {}, (), (), {}, skipped, found)
        every = [item for item in PROTOCOLS.values() if item.explained == protocols[0].explained]
        means = token_means(shown)
        texts = {"unigram": unigram_text(means, vocabulary)} if means else {}
        if explanation.text:
            own = {"none": explanation.text, "shuffled": null_text, "empty": prompts.EMPTY_EXPLANATION}
            texts |= {control: text for control, text in own.items() if text}
        return cls(explanation.neuron, texts, windows, tuple(scoring_windows(every, record)), means, skipped, found)

    @property
    def done(self) -> bool:
        found = self.found
        keys = {window.key for window in self.windows}
        return (
            found is not None
            and found.texts == self.texts
            and (found.skipped in (self.skipped, UNREAD) or str(found.skipped).startswith(REFUSED))
            and keys <= {*found.keys}
        )

    def simulate(self, simulator: Simulator, name: str) -> tuple[Simulation, RefusedError | None]:
        """Also on the windows that are kept of other protocols, so that none of them loses its own.

        A control whose prompts a server refuses is missing; the refusal is returned when all of them are.
        """
        keys = {window.key for window in self.windows} | {*(self.found.keys if self.found else ())}
        windows = [window for window in self.possible if window.key in keys]

        expected, skipped, refused, answered = {}, self.skipped, None, False
        for control, text in self.texts.items():
            try:
                rows = self._unigram(windows) if control == "unigram" else simulator(text, windows)
            except RefusedError as error:
                skipped, refused = error.answers[0].reason, error
                continue
            answered |= control != "unigram"
            if any(np.isnan(row).any() for row in rows):
                skipped = UNREAD
            else:
                expected[control] = tuple(tuple(round(float(value), DECIMALS) for value in row) for row in rows)
        keyed = tuple(window.key for window in windows)
        found = Simulation(self.neuron, name, self.texts, keyed, expected, skipped)
        return found, None if answered else refused

    def _unigram(self, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        return [np.array([self.means.get(token, 0.0) for token in window.tokens.tolist()]) for window in windows]


def token_means(windows: Sequence[Window]) -> dict[int, float]:
    """Mean activation of every token id in the windows."""
    if not windows:
        return {}
    tokens, places = np.unique(np.concatenate([window.tokens for window in windows]), return_inverse=True)
    activations = np.concatenate([window.activations for window in windows]).astype(np.float64)
    means = np.bincount(places, activations) / np.bincount(places)
    return dict(zip(tokens.tolist(), means.tolist(), strict=True))


def unigram_text(means: dict[int, float], vocabulary: Sequence[str]) -> str:
    """The tokens of the highest means, the highest first."""
    best = sorted((-mean, token) for token, mean in means.items() if mean > 0)[:UNIGRAM_SHOWN]
    return " ".join(display(vocabulary[token]).strip() for _, token in best)
