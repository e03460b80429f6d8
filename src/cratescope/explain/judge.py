"""Score explanations without simulating: an LLM answers yes or no about whole windows, or finds the foreign one.

Detection and fuzzing are after Paulo et al. 2024 (arXiv 2410.13928), intruder detection after Paulo and Belrose 2025
(arXiv 2507.08473); the prompts are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from rich.markup import escape
from rich.progress import track

from cratescope.explain import prompts
from cratescope.explain.config import JudgeConfig
from cratescope.explain.explain import STDERR
from cratescope.explain.explained import INTRUDER_GROUP, Explanation, Judgement, Waiting, claim_and_keep, judgements
from cratescope.explain.protocols import Protocol, protocols_named
from cratescope.explain.shown import MIN_LEVEL, levels
from cratescope.explain.simulate import ENOUGH, explained_layers, own_share
from cratescope.llm.interface import LanguageModel, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import NeuronId, NeuronRecord, Window, layer_file
from cratescope.neurons.sample import AT_ONCE, DEAD, UNDECODABLE, find_site, records_identity, undecodable, with_records
from cratescope.run import Run, claim
from cratescope.text.tokenizer import load_tokenizer, vocabulary_strings

WINDOWS = 10
"""At most this many active windows of a neuron, and as many silent ones."""
LEAST = 5
"""With fewer of either a neuron is skipped."""
WIDTH = 32
"""Tokens shown of a window, around its peak."""
INTRUDER_WIDTH = 12
INTRUDER_GROUPS = 8
TOO_FEW_ACTIVE = "too few active windows"
TOO_FEW_SILENT = "too few silent windows"
DECIMALS = 4


def judge(config: JudgeConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write judgements of every explained neuron and return the folder of each explanation set.

    What is finished is kept; a neuron is judged again when its texts are no longer the planned ones.

    Raises:
        UserError: no such site, protocol or explanations; or a folder holds judgements of something else.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    chosen = protocols_named(config.protocols)
    return [_judge_set(config, run, site, explained, chosen[explained][0], llm) for explained in chosen]


def _judge_set(
    config: JudgeConfig, run: Run, site: str, explained: str, protocol: Protocol, llm: LanguageModel | None
) -> Path:
    layers, identity = explained_layers(config, run, site, explained)
    folder = run.judgements(site, config.explainer, config.scorer, explained)
    known = records_identity(run, site) | llm_identity(config.llm, llm) | {"explanations": identity}
    known |= {"prompt": prompts.JUDGE_PROMPTS[config.scorer]}
    if (folder / "manifest.json").exists():
        claim(folder, known)
    tokenizer = load_tokenizer(run.model)
    vocabulary = vocabulary_strings(tokenizer)
    kept = judgements(folder)
    with kept.writing() as keep:
        waiting = Waiting(functools.partial(claim_and_keep, folder, known, keep), ENOUGH)
        for layer, explanations in layers.items():
            pairs, found = own_share(config, explanations), _told(kept, layer)
            pending = [(own, null) for own, null in pairs if not _done(found, config.scorer, own, null)]
            if not pending:
                continue
            llm = llm or open_llm(config.llm)
            asking = Judge(llm, vocabulary, protocol, config.scorer, config.llm.llm_batch)
            by_index = {own.neuron.index: (own, null) for own, null in pending}
            work = with_records(layer_file(run.records(site), layer), ([index] for index in by_index), AT_ONCE)
            label = escape(f"{config.scorer} {run.name} layer {layer}")
            for (index,), records in track(work, label, len(pending), console=STDERR, transient=True):
                judged, refused = asking.asked(records[index], *by_index[index])
                waiting.answered |= any(item.probabilities for item in judged)
                waiting.add(judged, refused)
        waiting.end(functools.partial(_any_judged, kept))
    return folder


def _told(kept: Kept[list[Judgement]], layer: int) -> dict[int, dict[str, str]]:
    """The texts that were judged, by neuron and control."""
    return {index: {item.control: item.text for item in items} for index, items in kept.read(layer).items()}


def _any_judged(kept: Kept[list[Judgement]]) -> bool:
    return any(item.probabilities for _, items in kept.all() for item in items)


def _texts(scorer: str, explanation: Explanation, null_text: str) -> dict[str, str]:
    """What is judged, by control; intruder detection needs no explanation."""
    if scorer == "intruder":
        return {"none": ""}
    return {control: text for control, text in (("none", explanation.text), ("shuffled", null_text)) if text}


def _unjudged(explanation: Explanation, null_text: str, scorer: str, reason: str | None) -> list[Judgement]:
    texts = _texts(scorer, explanation, null_text) or {"none": ""}
    return [Judgement(explanation.neuron, scorer, name, text, (), (), reason) for name, text in texts.items()]


def _done(found: dict[int, dict[str, str]], scorer: str, explanation: Explanation, null_text: str) -> bool:
    return found.get(explanation.neuron.index) == (_texts(scorer, explanation, null_text) or {"none": ""})


@dataclass(frozen=True)
class Example:
    """A window cut to what is shown, as token strings, and which of its tokens are marked."""

    tokens: list[str]
    marked: Bool[np.ndarray, " w"]
    active: bool


class Judge:
    """Asks `llm` about windows of a neuron that its explanation was not made from."""

    def __init__(
        self, llm: LanguageModel, vocabulary: Sequence[str], protocol: Protocol, scorer: str, batch: int
    ) -> None:
        self._llm, self._vocabulary, self._protocol = llm, vocabulary, protocol
        self._scorer, self._batch = scorer, batch
        self._prefix = llm.encode(prompts.judge_prefix(scorer))

    def asked(
        self, record: NeuronRecord, explanation: Explanation, null_text: str
    ) -> tuple[list[Judgement], RefusedError | None]:
        """Judgements of a neuron, or why there are none where a server refused the prompts."""
        try:
            return self.judgements(record, explanation, null_text), None
        except RefusedError as error:
            return _unjudged(explanation, null_text, self._scorer, error.answers[0].reason), error

    def judgements(self, record: NeuronRecord, explanation: Explanation, null_text: str) -> list[Judgement]:
        """One a control; a neuron that cannot be judged has one without answers, and the reason.

        Raises:
            RefusedError: a server refuses prompts of every control.
        """
        texts = _texts(self._scorer, explanation, null_text)
        active, silent = self._windows(record)
        reason = self._refusal(record, explanation, active, silent)
        if reason:
            return _unjudged(explanation, null_text, self._scorer, reason)
        random = np.random.default_rng([record.neuron.layer, record.neuron.index])
        ask = self._intruder if self._scorer == "intruder" else self._yes_or_no
        examples = [self._example(window, record, random) for window in (*active, *silent)]
        found, refused = [], None
        for name, text in texts.items():
            try:
                found.append(self._judgement(record.neuron, name, text, *ask(text, examples, random)))
            except RefusedError as error:
                refused = error
                found.append(Judgement(record.neuron, self._scorer, name, text, (), (), error.answers[0].reason))
        if refused and not any(item.probabilities for item in found):
            raise refused
        return found

    def _windows(self, record: NeuronRecord) -> tuple[list[Window], list[Window]]:
        """Active windows (the strongest ones and some by quantile) and silent ones, none of them explained from."""
        shown = self._protocol.explain_records(record)
        width = INTRUDER_WIDTH if self._scorer == "intruder" else WIDTH

        def unseen(windows: Sequence[Window]) -> list[Window]:
            cut = [window.cut(width) for window in windows]
            return [window for window in cut if not any(window.overlaps(other) for other in shown)]

        def peak(window: Window) -> int:
            return int(levels(window.activations, record.moments.maximum).max(initial=0))

        by_quantile = [window for stratum in record.by_quantile[::-1] for window in stratum.windows]
        strong, spread = (
            [window for window in unseen(windows) if peak(window) >= MIN_LEVEL] for windows in (record.top, by_quantile)
        )
        active = [*strong[: WINDOWS // 2], *spread]
        active = [*active, *strong[WINDOWS // 2 :]][:WINDOWS]
        return active, [window for window in unseen(record.random) if peak(window) == 0][:WINDOWS]

    def _refusal(
        self,
        record: NeuronRecord,
        explanation: Explanation,
        active: Sequence[Window],
        silent: Sequence[Window],
    ) -> str | None:
        if record.dead:
            return DEAD
        if self._scorer != "intruder" and not explanation.text:
            return explanation.skipped
        if undecodable((*active, *silent), len(self._vocabulary)):
            return UNDECODABLE
        return TOO_FEW_ACTIVE if len(active) < LEAST else TOO_FEW_SILENT if len(silent) < LEAST else None

    def _example(self, window: Window, record: NeuronRecord, random: np.random.Generator) -> Example:
        """Of an active window the tokens the explainer would be shown are marked, of a silent one as many at random."""
        level = levels(window.activations, record.moments.maximum)
        marked = level >= MIN_LEVEL
        active = bool(marked.any())
        if not active:
            marked[random.choice(len(marked), min(len(marked), 1 + int(random.integers(2))), replace=False)] = True
        return Example([self._vocabulary[token] for token in window.tokens], marked, active)

    def _yes_or_no(
        self, text: str, examples: Sequence[Example], _random: np.random.Generator
    ) -> tuple[list[float], list[bool]]:
        asked = [prompts.judge_prompt(self._scorer, text, item.tokens, item.marked) for item in examples]
        answers = self._probabilities(asked, prompts.YES_OR_NO)
        return answers[:, 0].tolist(), [item.active for item in examples]

    def _intruder(
        self, _text: str, examples: Sequence[Example], random: np.random.Generator
    ) -> tuple[list[float], list[bool]]:
        """Groups of the neuron's own windows and one silent window at a random place."""
        active = [item for item in examples if item.active]
        silent = [item for item in examples if not item.active]
        groups = []
        for number in range(INTRUDER_GROUPS):
            own = random.choice(len(active), INTRUDER_GROUP - 1, replace=False).tolist()
            group = [active[place] for place in own]
            group.insert(int(random.integers(INTRUDER_GROUP)), silent[number % len(silent)])
            groups.append(group)
        asked = [prompts.intruder_prompt([(item.tokens, item.marked) for item in group]) for group in groups]
        answers = self._probabilities(asked, prompts.PLACES)
        return answers.flatten().tolist(), [not item.active for group in groups for item in group]

    def _probabilities(self, asked: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, "n answers"]:
        """P(answer) of every prompt, of the given answers only."""
        choices = [self._llm.encode(answer) for answer in answers]
        prompted = [self._llm.encode(prompt) for prompt in asked]
        found = []
        for start in range(0, len(prompted), self._batch):
            chunk = prompted[start : start + self._batch]
            found += self._llm.slot_logprobs(self._prefix, chunk, [[len(ids)] for ids in chunk], choices)
        logprobs = np.concatenate(found).astype(np.float64)
        # A server may name none of the answers; then nothing is known of which is likelier.
        weights = np.exp(logprobs - np.nan_to_num(logprobs.max(1, keepdims=True), neginf=0.0))
        total = weights.sum(1, keepdims=True)
        return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / len(answers))

    def _judgement(
        self, neuron: NeuronId, control: str, text: str, probabilities: list[float], labels: list[bool]
    ) -> Judgement:
        rounded = tuple(round(value, DECIMALS) for value in probabilities)
        return Judgement(neuron, self._scorer, control, text, rounded, tuple(labels))
