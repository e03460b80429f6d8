"""Writes a small but complete run directory, so that whatever reads runs can be tested without training one."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cratescope.arm import Arm
from cratescope.explain.controls import OWN
from cratescope.explain.explained import Explained, Explanation, Simulation
from cratescope.explain.protocols import PROTOCOLS as EVERY_PROTOCOL
from cratescope.explain.protocols import scoring_windows
from cratescope.files import write_json, write_text
from cratescope.neurons.records import (
    Histogram,
    Moments,
    NeuronId,
    NeuronRecord,
    Stratum,
    TokenMean,
    Window,
    layer_file,
    write_records,
)
from cratescope.run import Run, claim
from cratescope.score import scores as scored
from cratescope.score.quality import write_quality
from cratescope.score.sanity import on_records
from cratescope.score.score import VERSION, score_neuron
from cratescope.score.words import Reader, WordsOf, words_for
from cratescope.text.tokenizer import vocabulary_strings

PROTOCOLS = {name: EVERY_PROTOCOL[name] for name in ("top-and-random", "random-only")}
TOPICS = {
    "words about the law": ["court", "judge", "contract", "party", "licence", "agreement", "law", "clause"],
    "months and dates": ["January", "March", "July", "Monday", "1998", "2003", "year", "week"],
    "food and cooking": ["salt", "butter", "oven", "flour", "sugar", "boil", "dish", "soup"],
    "code and symbols": ["def", "return", "class", "(", ")", "{", "}", ";"],
    "the sea": ["ship", "sea", "whale", "boat", "captain", "harbour", "wave", "sail"],
    "words about people": ["she", "he", "they", "man", "woman", "people", "friend", "king"],
}
GLUE = ["the", "of", "and", "a", "in", "to", "is", "that", "it", "for", "on", "with", "as", "was", "by"]


def fake_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some words, a newline, a tab, markup and a byte that is not text."""
    words = [word for words in TOPICS.values() for word in words] + GLUE
    texts = ["<|endoftext|>", *("Ġ" + word for word in words), "Ċ", "ĉ", "ĠĠ", "<b>", "&", '"', "Ã"]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@functools.cache
def fake_words() -> WordsOf:
    return words_for("offline", Reader(vocabulary_strings(fake_tokenizer())))


@dataclass(frozen=True)
class Fake:
    """What the fake run looks like. `quality` is how well a simulation follows the truth, from 0 to 1."""

    family: str = "crate"
    size: str = "2l"
    layers: int = 2
    neurons: int = 6
    window: int = 12
    seed: int = 0
    tokens_trained: int = 2_000_000
    quality: float = 0.7
    sparsity: float = 1.0
    dead: Sequence[int] = (5,)
    flat: Sequence[int] = (4,)
    explanation: str | None = None

    @property
    def site(self) -> str:
        return "codes" if self.family == "crate" else "mlp"


def fake_run(root: Path, fake: Fake | None = None) -> Run:
    """Write every file of the run. Dead neurons never fire; flat ones have a constant simulation, so score None."""
    fake = fake or Fake()
    run = Run(root)
    random = np.random.default_rng([fake.seed, len(fake.family)])
    _write_model(run, fake, random)
    claim(run.records(fake.site), {"imported": "made up"})
    every: list[NeuronRecord] = []
    for layer in range(fake.layers):
        records = [_record(NeuronId(run.name, fake.site, layer, index), fake, random) for index in range(fake.neurons)]
        write_records(layer_file(run.records(fake.site), layer), records)
        every += records
        _explain_and_score(run, fake, layer, records, random)
    folder = run.scores(fake.site, "offline", "list-pmi")
    made_with = {"top": {"site": fake.site, "llm": "offline", "records": {"excerpts": 20}}}
    about = {"explainer": "offline", "simulator": "list-pmi", "site": fake.site, "layers": [*range(fake.layers)]}
    sanity = [verdict.row() for verdict in on_records(PROTOCOLS.values(), every, fake_words())]
    inputs = {"version": str(VERSION)}
    write_json(folder / "scores.json", about | {"sanity": sanity, "made_with": made_with, "made_from": inputs})
    write_quality(run, fake.site, range(fake.layers))
    return run


def _write_model(run: Run, fake: Fake, random: np.random.Generator) -> None:
    manifest = {
        "name": run.name,
        "arm": Arm.trained(f"{fake.family}-{fake.size}", fake.seed, fake.tokens_trained, {}).row(),
        "parameters": 6_640_000 + fake.layers,
        "parameters_without_positions": 6_640_000,
        "n_layer": fake.layers,
        "n_neurons": fake.neurons,
        "context": 256,
        "steps": 100,
        "data": {"path": "somewhere/demo-data", "manifest_sha256": "0123456789abcdef" * 4},
        "settings": {"preset": f"{fake.family}-{fake.size}", "steps": 100, "learning_rate": 2e-3, "crate": {}},
        "versions": {"python": "3.11", "cratescope": "0.1.0"},
        "seconds": 754.2,
    }
    write_json(run.manifest, manifest)
    floor = 5.5 if fake.family == "crate" else 5.2
    rows: list[dict[str, Any]] = []
    for step in range(1, 101):
        tokens = fake.tokens_trained * step // 100
        loss = floor + 3 * np.exp(-step / 18)
        rows.append({"step": step, "tokens": tokens, "loss": loss + random.normal(0, 0.05), "learning_rate": 1e-3})
        if step % 10 == 0:
            rows.append({"step": step, "tokens": tokens, "validation_loss": loss, "validation_standard_error": 0.02})
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    top = [
        {"token": token, "probability": 0.3 / rank, "logit": 5.0 - rank}
        for rank, token in enumerate([" sea", " the", "\n", " <i>", " ship"], 1)
    ]
    prompts = ("They saw some boats on the", "Beijing is the capital of")
    evaluation = {"split": "validation", "crops": 64, "n_tokens": 16384, "loss": floor, "standard_error": 0.013}
    evaluation |= {"perplexity": float(np.exp(floor)), "bits_per_byte": 1.72, "unigram_entropy": 6.61, "versions": {}}
    evaluation["examples"] = [{"prompt": text, "top": top, "continuation": " sea.\nThey"} for text in prompts]
    write_json(run.evaluation, evaluation)


def _record(neuron: NeuronId, fake: Fake, random: np.random.Generator) -> NeuronRecord:
    """A neuron that fires on the words of one topic and, weakly, on others."""
    vocabulary = fake_tokenizer().get_vocab()
    topic = list(TOPICS.values())[neuron.index % len(TOPICS)]
    wanted = np.array([vocabulary["Ġ" + word] for word in topic])
    background = np.where(random.random(len(vocabulary)) < 0.2 * fake.sparsity, random.random(len(vocabulary)), 0)

    def window(place: int, share: float) -> Window:
        tokens = random.integers(1, len(vocabulary), fake.window)
        hits = random.random(fake.window) < share
        tokens[hits] = random.choice(wanted, hits.sum())
        activations = background[tokens] + np.where(np.isin(tokens, wanted), 3 * random.random(fake.window), 0)
        activations = (activations * (neuron.index not in fake.dead)).astype(np.float32)
        return Window(tokens, activations, place, 7, fake.window // 2)

    top = [window(place, 0.4) for place in range(10)]
    top.sort(key=lambda record: -float(record.activations.max()))
    chosen = tuple(window(place, 0.05) for place in range(10, 20))
    everything = np.concatenate([record.activations for record in chosen])
    maximum = float(top[0].activations.max())
    moments = Moments(10_000, float(everything.mean()), float(everything.var()), None, None, maximum)
    dead = neuron.index in fake.dead
    count, edges = np.histogram(everything, 20, (0, max(maximum, 1)))
    edges = edges.astype(float)
    strata = [window(20 + place, 0.1 * place) for place in range(5)]
    bounds = [0.0, 0.0, 0.5, 1.0, 2.0, maximum]
    means = [TokenMean(int(token), 2.0 - place, 10) for place, token in enumerate(wanted[:3])]
    return NeuronRecord(
        neuron,
        () if dead else tuple(top),
        chosen,
        moments,
        float((everything > 0).mean()),
        by_quantile=tuple(Stratum(*bounds[place : place + 2], (one,)) for place, one in enumerate(strata)),
        histogram=Histogram(edges[:-1][count > 0], edges[1:][count > 0], count[count > 0]),
        top_tokens=tuple(means),
        bottom_tokens=tuple(means[::-1]),
    )


def _explain_and_score(
    run: Run, fake: Fake, layer: int, records: Sequence[NeuronRecord], random: np.random.Generator
) -> None:
    made = [_explained(fake, record, random) for record in records]
    explained = Explained(run, fake.site, "offline", "top")
    explained.explanations.write([said for said, _ in made])
    simulations = [simulation for _, simulation in made]
    explained.simulations("list-pmi").write(simulations)
    scores = [
        [score for protocol in PROTOCOLS.values() for score in score_neuron(record, simulation, protocol, fake_words())]
        for record, simulation in zip(records, simulations, strict=True)
    ]
    scored.scores(run.scores(fake.site, "offline", "list-pmi")).replace(layer, scores)


def _explained(fake: Fake, record: NeuronRecord, random: np.random.Generator) -> tuple[Explanation, Simulation]:
    neuron = record.neuron
    if record.dead:
        silent = Explanation(neuron, "", "offline", "words", skipped="dead neuron")
        return silent, Simulation(neuron, "list-pmi", {}, (), {}, skipped="dead neuron")
    text = fake.explanation or list(TOPICS)[neuron.index % len(TOPICS)]
    windows = scoring_windows(PROTOCOLS.values(), record)
    quality = fake.quality * random.random() * (neuron.index not in fake.flat)
    share = {OWN: quality, "shuffled": 0.05, "empty": 0.05, "unigram": 0.4}
    expected = {
        control: tuple(tuple(_guess(item.activations, part, random)) for item in windows)
        for control, part in share.items()
    }
    keys = tuple(item.key for item in windows)
    texts = {OWN: text, "shuffled": "words about the law", "empty": "some tokens of a text", "unigram": "the of"}
    simulation = Simulation(neuron, "list-pmi", texts, keys, expected)
    return Explanation(neuron, text, "offline", "words"), simulation


def _guess(truth: np.ndarray, quality: float, random: np.random.Generator) -> list[float]:
    if quality == 0:
        return [0.0] * len(truth)
    noise = random.random(len(truth)) * (random.random(len(truth)) < 0.15)
    return [round(float(value), 4) for value in quality * (truth > 0.7) * 2 + (1 - quality) * noise]
