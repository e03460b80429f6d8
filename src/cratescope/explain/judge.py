"""Score explanations without simulating: an LLM answers questions about whole windows (explain/judges)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.errors import UserError
from cratescope.explain.config import NOT_JUDGED, JudgeConfig
from cratescope.explain.controls import OWN, Material, texts_of
from cratescope.explain.explained import Explained, Judgement, Told
from cratescope.explain.judges import question_named
from cratescope.explain.protocols import ExplanationSet, protocols_named
from cratescope.explain.shown import MIN_LEVEL, Marked, levels
from cratescope.explain.waiting import ENOUGH, keeping
from cratescope.llm.answers import EMPTY_ANSWER
from cratescope.llm.interface import LanguageModel, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.neurons.records import AT_ONCE, NeuronRecord, Window, layer_file
from cratescope.neurons.sample import DEAD, UNDECODABLE, find_site, undecodable, with_records
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.tokenizer import vocabulary_strings
from cratescope.workers import share

WINDOWS = 10
"""At most this many active windows of a neuron, and as many silent ones."""
LEAST = 5
"""With fewer of either a neuron is skipped."""
TOO_FEW_ACTIVE = "too few active windows"
TOO_FEW_SILENT = "too few silent windows"
NO_STRENGTH = "its maximum is not above 0"
TOO_FEW_OTHERS = "too few other neurons"
DECIMALS = 4


def judge(config: JudgeConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write judgements of every explained neuron and return the folder of each explanation set.

    What is finished is kept; a neuron is judged again when its texts are no longer the planned ones.

    Raises:
        UserError: no such site, protocol or explanations; or a folder holds judgements of something else.
    """
    if config.explainer in NOT_JUDGED and not question_named(config.scorer).of_texts:
        raise UserError(
            f"--explainer {config.explainer}: these were chosen on windows that a judge would be shown; judge "
            "explanations of an LLM"
        )
    run = Run(config.run)
    site = find_site(run, config.site)
    return [
        _judge_set(config, Explained(run, site, config.explainer, chosen.name), chosen, llm)
        for chosen in protocols_named(config.protocols)
    ]


def _judge_set(config: JudgeConfig, explained: Explained, chosen: ExplanationSet, llm: LanguageModel | None) -> Path:
    run, layers, kept = explained.run, explained.layers(), explained.judgements(config.scorer)
    identity = explained.origin | llm_identity(config.llm, llm) | {"explanations": explained.identity()}
    identity |= {"prompt": question_named(config.scorer).version} | _made_with_texts(config, explained)
    begin = functools.partial(claim, kept.folder, identity)
    vocabulary, shown = vocabulary_strings(run.tokenizer), explained.shown(chosen)
    with keeping(kept, begin, ENOUGH, _any_judged) as waiting:
        for layer, told in layers.items():
            mine = share(told[: config.neurons], config.worker, config.llm.llm_batch)
            found = {index: {item.control: item.text for item in items} for index, items in kept.read(layer).items()}
            wanted = {one.explanation.neuron.index: one for one in mine}
            pending = [index for index, one in wanted.items() if found.get(index) != _texts(one, config.scorer)]
            if not pending:
                continue
            asking = Asking(llm or open_llm(config.llm), config.scorer, config.llm.llm_batch)
            every = [one.explanation.neuron.index for one in told[: config.neurons]]
            judge: Judge | TextJudge
            if asking.question.of_texts:
                judge = TextJudge(asking, _written(config, explained, layer, every))
            else:
                judge = Judge(asking, vocabulary, shown)
            work = with_records(layer_file(run.records(explained.site), layer), ([index] for index in pending), AT_ONCE)
            for (index,), records in progress(work, f"{config.scorer} {run.name} layer {layer}", len(pending)):
                judged, refused = judge.asked(records[index], wanted[index])
                waiting.answered |= _any_judged(judged)
                waiting.add(judged, refused)
    return kept.folder


def _made_with_texts(config: JudgeConfig, explained: Explained) -> dict[str, Any]:
    """What decides the texts that a question is about, if it is about texts that the model writes."""
    if not question_named(config.scorer).of_texts:
        return {}
    from cratescope.neurons.written import texts_identity  # needs torch, as other judges do not

    return {"texts": texts_identity(explained.run, explained.site, config.strength)}


def _written(
    config: JudgeConfig, explained: Explained, layer: int, indices: Sequence[int]
) -> dict[int, tuple[str, ...]]:
    """The texts of each of these neurons; whichever worker comes first writes them."""
    from cratescope.neurons.written import write_texts

    found = write_texts(explained.run, explained.site, layer, indices, config.strength)
    return {index: one.texts for index, one in found.items()}


def _any_judged(items: Sequence[Judgement]) -> bool:
    return any(item.probabilities for item in items)


def _texts(told: Told, scorer: str) -> dict[str, str]:
    """What is judged, by control; a neuron that nothing can be judged of has its own explanation, which is empty."""
    question = question_named(scorer)
    texts = texts_of(Material(told.explanation.text, told.other)) if question.needs_text else {}
    return {name: text for name, text in texts.items() if name in question.controls} or {OWN: ""}


class Asking:
    """Asks `llm` a scorer's question about windows, for a neuron's own explanation and each control."""

    def __init__(self, llm: LanguageModel, scorer: str, batch: int) -> None:
        self._llm, self._batch, self._scorer = llm, batch, scorer
        self.question = question_named(scorer)
        self._prefix = llm.encode(self.question.prefix)

    def asked(
        self, told: Told, windows: Sequence[Marked], reason: str | None, random: np.random.Generator
    ) -> tuple[list[Judgement], RefusedError | None]:
        """Judgements of a neuron, one per control, and the refusal where a server refused the prompts of all.

        reason: why it cannot be judged, if so; then it has judgements without answers.
        """
        found, refused = [], None
        for control, text in _texts(told, self._scorer).items():
            unjudged = Judgement(told.explanation.neuron, self._scorer, control, text, (), (), reason)
            try:
                found.append(unjudged if reason else self._judged(unjudged, windows, random))
            except RefusedError as error:
                refused = error
                found.append(dataclasses.replace(unjudged, skipped=error.answers[0].reason))
        return found, None if _any_judged(found) else refused

    def _judged(self, unjudged: Judgement, windows: Sequence[Marked], random: np.random.Generator) -> Judgement:
        """The same with answers: for every window the probability that it is the right one, and whether it is."""
        asked, labels = self.question.prompts(unjudged.text, windows, random)
        found = self._probabilities(asked)[:, : self.question.group].flatten().tolist()
        rounded = tuple(round(value, DECIMALS) for value in found)
        return dataclasses.replace(unjudged, probabilities=rounded, labels=tuple(labels))

    def _probabilities(self, asked: Sequence[str]) -> Float[np.ndarray, "n answers"]:
        """P(answer) of every prompt, of the possible answers only."""
        choices = [self._llm.encode(answer) for answer in self.question.answers]
        prompted = [self._llm.encode(prompt) for prompt in asked]
        found = []
        for start in range(0, len(prompted), self._batch):
            chunk = prompted[start : start + self._batch]
            found += self._llm.slot_logprobs(self._prefix, chunk, [[len(ids)] for ids in chunk], choices)
        logprobs = np.concatenate(found).astype(np.float64)
        # A server may name none of the answers; then nothing is known of which is likelier.
        weights = np.exp(logprobs - np.nan_to_num(logprobs.max(1, keepdims=True), neginf=0.0))
        total = weights.sum(1, keepdims=True)
        return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / len(choices))


class Judge:
    """Asks about windows of a neuron that its explanation was not made from."""

    def __init__(self, asking: Asking, vocabulary: Sequence[str], chosen: ExplanationSet) -> None:
        self._asking, self._question = asking, asking.question
        self._vocabulary, self._set = vocabulary, chosen

    def asked(self, record: NeuronRecord, told: Told) -> tuple[list[Judgement], RefusedError | None]:
        """As of `Asking`."""
        active, silent = self._windows(record)
        reason = self._reason(record, told, active, silent)
        random = np.random.default_rng([record.neuron.layer, record.neuron.index])
        windows = [] if reason else [self._marked(window, record, random) for window in (*active, *silent)]
        return self._asking.asked(told, windows, reason, random)

    def _windows(self, record: NeuronRecord) -> tuple[list[Window], list[Window]]:
        """Active windows (the strongest ones and some by quantile) and silent ones, none of them explained from."""
        shown = self._set.windows(record)

        def unseen(windows: Sequence[Window]) -> list[Window]:
            cut = [window.cut(self._question.width) for window in windows]
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

    def _reason(
        self, record: NeuronRecord, told: Told, active: Sequence[Window], silent: Sequence[Window]
    ) -> str | None:
        """Why the neuron cannot be judged, if so."""
        if record.dead:
            return DEAD
        if self._question.needs_text and not told.explanation.text:
            return told.explanation.skipped or EMPTY_ANSWER
        if undecodable((*active, *silent), len(self._vocabulary)):
            return UNDECODABLE
        return TOO_FEW_ACTIVE if len(active) < LEAST else TOO_FEW_SILENT if len(silent) < LEAST else None

    def _marked(self, window: Window, record: NeuronRecord, random: np.random.Generator) -> Marked:
        """Of an active window the tokens the explainer would be shown are marked, of a silent one as many at random."""
        level = levels(window.activations, record.moments.maximum)
        marked = level >= MIN_LEVEL
        active = bool(marked.any())
        if not active:
            marked[random.choice(len(marked), min(len(marked), 1 + int(random.integers(2))), replace=False)] = True
        return Marked([self._vocabulary[token] for token in window.tokens], marked, active)


class TextJudge:
    """Asks which of some texts was written with a neuron forced, each of them with another one of the layer.

    texts: by neuron, one for each beginning; none for a neuron that is never active.
    """

    def __init__(self, asking: Asking, texts: Mapping[int, Sequence[str]]) -> None:
        self._asking, self._texts = asking, texts

    def asked(self, record: NeuronRecord, told: Told) -> tuple[list[Judgement], RefusedError | None]:
        """As of `Asking`."""
        reason = self._reason(record, told)
        random = np.random.default_rng([record.neuron.layer, record.neuron.index])
        windows = [] if reason else [*self._groups(record.neuron.index, random)]
        return self._asking.asked(told, windows, reason, random)

    def _reason(self, record: NeuronRecord, told: Told) -> str | None:
        if record.dead:
            return DEAD
        if not told.explanation.text:
            return told.explanation.skipped or EMPTY_ANSWER
        if record.neuron.index not in self._texts:
            return NO_STRENGTH
        return None if len(self._texts) >= self._asking.question.group else TOO_FEW_OTHERS

    def _groups(self, index: int, random: np.random.Generator) -> Iterator[Marked]:
        """For every beginning the neuron's own text and those of others, in a random order."""
        others = [other for other in self._texts if other != index]
        for beginning, own in enumerate(self._texts[index]):
            chosen = random.choice(len(others), self._asking.question.group - 1, replace=False)
            group = [Marked([self._texts[others[place]][beginning]], np.zeros(1, bool), False) for place in chosen]
            group.insert(int(random.integers(len(group) + 1)), Marked([own], np.zeros(1, bool), True))
            yield from group
