"""Ask a language model for one phrase a neuron, from the words that excite it most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.explain.explained import Explanation
from cratescope.explain.output_wording import OutputWording
from cratescope.explain.phrase import clean_answer
from cratescope.explain.protocols import ExplanationSet
from cratescope.explain.shown import Shown
from cratescope.explain.wording import wording_named
from cratescope.llm.answers import EMPTY_ANSWER, ONLY_REASONING
from cratescope.llm.interface import LanguageModel, NoAnswer, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.llm.reasoning import without_reasoning
from cratescope.neurons.effects import Effects, kept_effects
from cratescope.neurons.records import NeuronRecord
from cratescope.neurons.sample import DEAD, UNDECODABLE, check_identity, records_identity, undecodable
from cratescope.run import Run
from cratescope.text.tokenizer import token_strings, vocabulary_strings

MAX_TOKENS = 60
"""Longest answer (paper section 4)."""
NOTHING_TO_SHOW = "no readable token"


class Asks:
    """The explainer `llm`: all neurons of a batch are asked about in one call of the model."""

    def __init__(self, config: ExplainConfig, run: Run, site: str, llm: LanguageModel | None) -> None:
        self._config, self._run, self._llm = config, run, llm
        by_output = config.from_ != "activations"
        self._wording = OutputWording(config.from_) if by_output else wording_named(config.prompts)
        self._effects = kept_effects(run.effects(site)) if by_output else None
        self._origin = records_identity(run, site) if by_output else {}
        self._max_tokens = config.llm.llm_max_tokens or MAX_TOKENS
        self.batch = config.llm.llm_batch

    def made_with(self, chosen: ExplanationSet) -> dict[str, Any]:
        asked = {"prompt": self._wording.explain_version, "max_tokens": self._max_tokens}
        asked |= {"windows": self._config.windows} if self._config.windows else {}
        if self._effects:
            if not self._effects.layers:
                raise UserError(f"{self._effects.folder}: no effects; run `cratescope effects {self._run.root}` first")
            asked |= {"from": self._config.from_, "effects": check_identity(self._effects.folder, self._origin)}
        return llm_identity(self._config.llm, self._llm) | asked

    def explained(
        self, chosen: ExplanationSet, records: Sequence[NeuronRecord]
    ) -> list[tuple[Explanation, UserError | None]]:
        llm = self._llm = self._llm or open_llm(self._config.llm)
        effects = self._measured(records)
        asked = [self._prompt(chosen, record, effects.get(record.neuron.index)) for record in records]
        prompts = [llm.encode(prompt) for prompt, _ in asked if prompt]
        answers = iter(self._answers(llm, prompts) if prompts else [])
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
            name, version = self._config.explainer_name, self._wording.explain_version
            found.append((Explanation(record.neuron, text, name, version, reason), problem))
        return found

    def _answers(self, llm: LanguageModel, prompts: Sequence[list[int]]) -> Sequence[str | NoAnswer]:
        prefix = llm.encode(self._wording.explain_prefix())
        try:
            return llm.generate(prefix, prompts, self._max_tokens, "\n")
        except RefusedError as error:
            return error.answers

    def _problem(self, answer: NoAnswer) -> UserError:
        told = f"none of its answers can be used, the first one for this reason: {answer.reason}"
        return UserError(f"{self._config.explainer_name}: {told}; {answer.fix}")

    def _measured(self, records: Sequence[NeuronRecord]) -> dict[int, Effects]:
        """Effects by index of some neurons of a layer, where they are to be shown."""
        if not self._effects or not records:
            return {}
        layer, wanted = records[0].neuron.layer, [record.neuron.index for record in records]
        found = self._effects.read(layer, wanted)
        if missing := [index for index in wanted if index not in found]:
            raise UserError(
                f"{self._effects.folder}: no effects of layer {layer} neuron {missing[0]}; run `cratescope effects` "
                "for as many --neurons and --layers, with the same --neuron-seed"
            )
        return found

    def _prompt(self, chosen: ExplanationSet, record: NeuronRecord, effects: Effects | None) -> tuple[str, str | None]:
        """The neuron's own part of the prompt, or why there is none."""
        if record.dead:
            return "", DEAD
        windows, tokenizer = chosen.windows(record), self._run.tokenizer
        if undecodable(windows, len(vocabulary_strings(tokenizer))):
            return "", UNDECODABLE
        shown = [Shown(token_strings(tokenizer, window.tokens.tolist()), window.activations) for window in windows]
        maximum = record.moments.maximum
        if isinstance(self._wording, OutputWording):
            prompt = self._wording.explain_prompt(shown, maximum, effects) if effects else ""
        else:
            prompt = self._wording.explain_prompt(shown, maximum)
        return prompt, None if prompt else NOTHING_TO_SHOW
