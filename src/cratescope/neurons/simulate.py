"""Predict a neuron's activations from an explanation alone: its own, and another neuron's as a control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.progress import track

from cratescope.config import SimulateConfig
from cratescope.lm.tokenizer import load_tokenizer, token_strings
from cratescope.neurons import prompts
from cratescope.neurons.explain import STDERR, check_identity, draw_neurons, find_site, records_identity
from cratescope.neurons.llm import LanguageModel, llm_identity, open_llm
from cratescope.neurons.records import (
    PROTOCOLS,
    ActivationRecord,
    Explanation,
    NeuronRecord,
    Simulation,
    layer_file,
    neuron_file,
    read_explanations,
    read_records,
    write_simulation,
)
from cratescope.run import Run, UserError, claim, read_json

ITEMS = 3
"""list-pmi averages the distributions of this many list items, the first ones written greedily."""
THRESHOLD = 2.0
"""list-pmi: nats above the generic list below which a token counts as not meant."""
DECIMALS = 4


class ListPMI:
    """A value for every token of the vocabulary from the words the LLM would list for an explanation; ignores context.

    value(token) = relu(log P(token | explanation) - mean over generic explanations of log P(token) - 2), P being
    averaged over the first three list items. A token stands for the first LLM token of its text as a list item.
    """

    prompt = prompts.LIST_PROMPT
    scale = "nats"
    constants = {"items": ITEMS, "threshold": THRESHOLD}

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._prefix = llm.encode(prompts.list_prefix())
        self._separator = llm.encode(prompts.SEPARATOR)
        self._columns: dict[int, int] = {}
        self._texts: list[str] = []
        self._tables: dict[str, Float[np.ndarray, " vocab"]] = {}
        self._generic = self._list_logprobs(prompts.GENERIC_EXPLANATIONS).mean(0)

    def plan(self, texts: Sequence[str]) -> None:
        """Say which texts may be asked for; they are computed in batches of this order whatever is asked first."""
        self._texts, self._tables = list(dict.fromkeys(texts)), {}

    def __call__(self, text: str, records: Sequence[ActivationRecord]) -> list[Float[np.ndarray, " w"]]:
        if text not in self._tables:
            start = self._texts.index(text) // self._batch * self._batch
            chunk = self._texts[start : start + self._batch]
            values = np.maximum(self._list_logprobs(chunk) - self._generic - THRESHOLD, 0)
            self._tables |= dict(zip(chunk, np.pad(values, ((0, 0), (0, 1))), strict=True))
        return [self._tables[text][[self._column(token) for token in record.tokens.tolist()]] for record in records]

    def _column(self, token: int) -> int:
        """The LLM token a subject token stands for: the first one of its list item, or the last column, of zeros."""
        if token not in self._columns:
            item = prompts.list_item(self._vocabulary[token])
            self._columns[token] = self._llm.encode(item)[0] if item else -1
        return self._columns[token]

    def _list_logprobs(self, texts: Sequence[str]) -> Float[np.ndarray, "n vocab"]:
        """log of the mean over list items of P(token is the next item)."""
        asked = [self._llm.encode(prompts.list_prompt(text)) for text in texts]
        found = []
        for _ in range(ITEMS):
            logprobs = self._llm.next_logprobs(self._prefix, asked)
            found.append(logprobs)
            best = logprobs.argmax(1).tolist()
            asked = [[*ids, token, *self._separator] for ids, token in zip(asked, best, strict=True)]
        return np.logaddexp.reduce(found, axis=0) - np.log(ITEMS)


class AllAtOnce:
    """OpenAI's protocol in our words: a value in the slot behind every token of a record, all in one forward pass.

    expected value = sum of v P(v) / sum of P(v) over the values v = 0..10, or 0..9 where "10" is no single token.
    """

    prompt = prompts.ALL_AT_ONCE_PROMPT
    constants: dict[str, float] = {}

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._choices = prompts.digit_choices(llm)
        self.scale = f"0-{len(self._choices) - 1}"
        self._prefix = prompts.slots_prefix(llm, len(self._choices) - 1)

    def plan(self, texts: Sequence[str]) -> None:
        """Nothing to share between texts: every record is its own prompt."""

    def __call__(self, text: str, records: Sequence[ActivationRecord]) -> list[Float[np.ndarray, " w"]]:
        asked = [
            prompts.slot_prompt(self._llm, text, [self._vocabulary[token] for token in record.tokens])
            for record in records
        ]
        found = []
        for start in range(0, len(asked), self._batch):
            chunk = asked[start : start + self._batch]
            ids, slots = [item.ids for item in chunk], [item.slots for item in chunk]
            found += self._llm.slot_logprobs(self._prefix, ids, slots, self._choices)
        return [self._expected(logprobs) for logprobs in found]

    def _expected(self, logprobs: Float[np.ndarray, "w choices"]) -> Float[np.ndarray, " w"]:
        weights = np.exp(logprobs - logprobs.max(1, keepdims=True))
        return (weights @ np.arange(len(self._choices))) / weights.sum(1)


def simulate(config: SimulateConfig, llm: LanguageModel | None = None) -> Path:
    """Write one simulation file for every explained neuron and return their folder; finished files are kept.

    A neuron without an explanation gets a file without values. A file is made again when its texts are no longer the
    planned ones (more neurons were explained, so the control's partner may be another).

    Raises:
        UserError: no such site or explanations; or the folder holds simulations of something else.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    layers, identity = explained_layers(run, site, config.explainer)
    if config.neurons is not None and config.neurons < 1:
        raise UserError(f"--neurons {config.neurons}: give a number of 1 or more")
    folder = run.simulations(site, config.explainer, config.simulator)
    known = records_identity(run, site) | llm_identity(config.llm, llm) | {"explanations": identity}
    planned = {
        layer: list(zip(explanations, null_texts(explanations), strict=True))[: config.neurons]
        for layer, explanations in layers.items()
    }
    pending = {
        layer: [(own, null) for own, null in pairs if not _done(folder, own, null)] for layer, pairs in planned.items()
    }
    if (folder / "manifest.json").exists():
        check_identity(folder, known)
    if not any(pending.values()):
        return folder
    llm = llm or open_llm(config.llm)
    tokenizer = load_tokenizer(run.model)
    vocabulary = token_strings(tokenizer, range(len(tokenizer)))
    make = ListPMI if config.simulator == "list-pmi" else AllAtOnce
    simulator = make(llm, vocabulary, config.llm.llm_batch)
    claim(folder, known | {"prompt": simulator.prompt, "scale": simulator.scale} | simulator.constants)
    for layer, pairs in pending.items():
        simulator.plan([explanation.text for explanation in layers[layer] if explanation.text])
        records = read_records(layer_file(run.records(site), layer), [own.neuron.index for own, _ in pairs])
        for own, null in track(pairs, f"simulate {run.name} layer {layer}", console=STDERR, transient=True):
            write_simulation(folder, _simulation(own, null, records[own.neuron.index], simulator, config.simulator))
    return folder


def explained_layers(run: Run, site: str, explainer: str) -> tuple[dict[int, list[Explanation]], dict[str, Any]]:
    """Every layer's explanations in the order in which neurons were drawn, and what they were made from.

    Raises:
        UserError: there are none, or they belong to another model.
    """
    folder = run.explanations(site, explainer)
    found = read_explanations(folder)
    if not found:
        raise UserError(f"{folder}: no explanations; run `cratescope explain` first, or name another --explainer")
    identity = check_identity(folder, records_identity(run, site))
    layers: dict[int, list[Explanation]] = {}
    for neuron, explanation in found.items():
        layers.setdefault(neuron.layer, []).append(explanation)
    for layer, explanations in layers.items():
        drawn = draw_neurons(layer_file(run.records(site), layer), identity["neuron_seed"], layer)
        by_index = {item.neuron.index: item for item in explanations}
        layers[layer] = [by_index[index] for index in drawn if index in by_index]
    return layers, identity


def null_texts(explanations: Sequence[Explanation]) -> list[str]:
    """For every explanation the nearest different one before it, going round: another neuron's, never its own text.

    The order is the random one in which neurons were drawn, so this is a seeded pairing that needs no draw of its own.
    Empty for a neuron without an explanation, and where the whole layer has one text only.
    """
    return [next(_others(explanations, place), "") if item.text else "" for place, item in enumerate(explanations)]


def _others(explanations: Sequence[Explanation], place: int) -> Iterator[str]:
    for step in range(1, len(explanations)):
        text = explanations[place - step].text
        if text and text != explanations[place].text:
            yield text


def scoring_records(record: NeuronRecord) -> list[ActivationRecord]:
    """Every record that some protocol scores on, once."""
    found = [window for protocol in PROTOCOLS.values() for window in protocol.score_records(record)]
    return list({window.key: window for window in found}.values())


def _done(folder: Path, explanation: Explanation, null_text: str) -> bool:
    path = neuron_file(folder, explanation.neuron)
    if not path.exists():
        return False
    found = read_json(path)
    return (found["text"], found["null_text"]) == (explanation.text, null_text)


def _simulation(
    explanation: Explanation, null_text: str, record: NeuronRecord, simulator: ListPMI | AllAtOnce, name: str
) -> Simulation:
    records = scoring_records(record) if explanation.text else []

    def expected(text: str) -> tuple[tuple[float, ...], ...]:
        rows = simulator(text, records) if text else []
        return tuple(tuple(round(float(value), DECIMALS) for value in row) for row in rows)

    return Simulation(
        neuron=explanation.neuron,
        simulator=name,
        text=explanation.text,
        null_text=null_text,
        keys=tuple(window.key for window in records),
        expected=expected(explanation.text),
        null_expected=expected(null_text),
    )
