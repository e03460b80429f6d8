"""Ask a language model for one phrase a neuron, from the words that excite it most."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.explain.explained import Explained, Explanation
from cratescope.explain.phrase import clean_answer
from cratescope.explain.protocols import ExplanationSet, protocols_named
from cratescope.explain.shown import Shown
from cratescope.explain.waiting import Waiting, keeping
from cratescope.explain.wording import Wording, wording_named
from cratescope.llm.answers import EMPTY_ANSWER, ONLY_REASONING
from cratescope.llm.interface import LanguageModel, NoAnswer, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.llm.reasoning import without_reasoning
from cratescope.neurons.records import AT_ONCE, NeuronRecord, layer_file
from cratescope.neurons.sample import (
    DEAD,
    UNDECODABLE,
    draw_neurons,
    find_site,
    record_files,
    records_identity,
    undecodable,
    with_records,
)
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.tokenizer import token_strings, vocabulary_strings
from cratescope.workers import share

MAX_TOKENS = 60
"""Longest answer (paper section 4)."""
ENOUGH = 16
"""So many refusals and useless answers, and nothing else, are no matter of single neurons."""
NOTHING_TO_SHOW = "no readable token"


def explain(config: ExplainConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write an explanation of every sampled neuron and return the folder of each explanation set.

    A dead neuron, or one whose answer is empty or refused, gets a row with no text and the reason in `skipped`, so
    that the sample stays what was drawn. Finished rows are kept.

    Raises:
        UserError: no such site, layer, protocol or number of neurons; a folder holds explanations of something else; or
            a server gives no answer that can be used.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    samples = _samples(config, run.records(site))
    wording = wording_named(config.prompts)
    max_tokens = config.llm.llm_max_tokens or MAX_TOKENS
    made_with = {"prompt": wording.explain_version, "max_tokens": max_tokens, "neuron_seed": config.neuron_seed}
    made_with = records_identity(run, site) | llm_identity(config.llm, llm) | made_with
    folders = []
    for chosen in protocols_named(config.protocols):
        kept = Explained(run, site, config.llm.llm_name, chosen.name).explanations
        begin = functools.partial(claim, kept.folder, made_with | {"explained": chosen.name})
        folders.append(kept.folder)
        with keeping(kept, begin, ENOUGH, lambda item: bool(item.text)) as waiting:
            for layer, indices in samples.items():
                indices = share(indices, config.worker, config.llm.llm_batch)
                done = kept.done(layer) & {*indices}
                if len(done) < len(indices):
                    llm = llm or open_llm(config.llm)
                    asking = Asking(llm, run.tokenizer, wording, chosen, config.llm.llm_name, max_tokens)
                    path = layer_file(run.records(site), layer)
                    _explain_layer(path, layer, indices, done, waiting, asking.asked, config.llm.llm_batch)
    return folders


def _samples(config: ExplainConfig, folder: Path) -> dict[int, list[int]]:
    """The neurons to explain in every layer, in the order they were drawn."""
    samples = {}
    for layer, path in record_files(folder, config.layers).items():
        drawn = draw_neurons(path, config.neuron_seed, layer)
        wanted = len(drawn) if config.neurons is None else config.neurons
        if not 1 <= wanted <= len(drawn):
            raise UserError(
                f"--neurons {wanted}: layer {layer} has {len(drawn)} neurons; give a number from 1 to {len(drawn)}"
            )
        samples[layer] = drawn[:wanted]
    return samples


def _explain_layer(
    path: Path,
    layer: int,
    indices: Sequence[int],
    done: Container[int],
    waiting: Waiting[Explanation],
    ask: Callable[[Sequence[NeuronRecord]], Sequence[tuple[Explanation, UserError | None]]],
    batch: int,
) -> None:
    """Explain one layer's sample in batches that depend on the sample alone.

    Rounding differs with what else is in a batch and may turn a close choice of the model, so a batch with a missing
    neuron is asked again as a whole: an interrupted run ends with the same bytes as one that was not.
    """
    chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    pending = [chunk for chunk in chunks if any(index not in done for index in chunk)]
    work = with_records(path, pending, AT_ONCE // batch + 1)
    for chunk, records in progress(work, f"explain layer {layer}", len(pending)):
        found = ask([records[index] for index in chunk])
        waiting.answered |= any(explanation.text for explanation, _ in found)
        for explanation, problem in found:
            if explanation.neuron.index not in done:
                waiting.add(explanation, problem)


@dataclass(frozen=True)
class Asking:
    """Who is asked for explanations, in which words, and from which windows."""

    llm: LanguageModel
    tokenizer: PreTrainedTokenizerFast
    wording: Wording
    windows: ExplanationSet
    explainer: str
    max_tokens: int = MAX_TOKENS

    def explanations(self, records: Sequence[NeuronRecord]) -> list[Explanation]:
        """One a neuron, in one call of the model."""
        return [explanation for explanation, _ in self.asked(records)]

    def asked(self, records: Sequence[NeuronRecord]) -> list[tuple[Explanation, UserError | None]]:
        """The same, each with what to say where a server's answer cannot be used and no other can."""
        asked = [self._prompt(record) for record in records]
        prompts = [self.llm.encode(prompt) for prompt, _ in asked if prompt]
        answers = iter(self._answers(prompts) if prompts else [])
        found = []
        for record, (prompt, reason) in zip(records, asked, strict=True):
            answer = next(answers) if prompt else ""
            text, problem = "", None
            if isinstance(answer, NoAnswer):
                reason, problem = answer.reason, self._problem(answer)
            elif prompt:
                text = clean_answer(answer)
                unsaid = ONLY_REASONING if answer.strip() and not without_reasoning(answer).strip() else EMPTY_ANSWER
                reason = None if text else unsaid
            one = Explanation(record.neuron, text, self.explainer, self.wording.explain_version, reason)
            found.append((one, problem))
        return found

    def _answers(self, prompts: Sequence[list[int]]) -> Sequence[str | NoAnswer]:
        prefix = self.llm.encode(self.wording.explain_prefix())
        try:
            return self.llm.generate(prefix, prompts, self.max_tokens, "\n")
        except RefusedError as error:
            return error.answers

    def _problem(self, answer: NoAnswer) -> UserError:
        told = f"{self.explainer}: none of its answers can be used, the first one for this reason: {answer.reason}"
        return UserError(f"{told}; {answer.fix}")

    def _prompt(self, record: NeuronRecord) -> tuple[str, str | None]:
        """The neuron's own part of the prompt, or why there is none."""
        if record.dead:
            return "", DEAD
        windows = self.windows.windows(record)
        if undecodable(windows, len(vocabulary_strings(self.tokenizer))):
            return "", UNDECODABLE
        shown = [Shown(token_strings(self.tokenizer, window.tokens.tolist()), window.activations) for window in windows]
        prompt = self.wording.explain_prompt(shown, record.moments.maximum)
        return prompt, None if prompt else NOTHING_TO_SHOW
