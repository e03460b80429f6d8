"""The explainer `terms`: what `explain` asks for explanations when no language model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cratescope.errors import UserError
from cratescope.explain.config import TERMS, TermsConfig
from cratescope.explain.explained import Explanation
from cratescope.explain.protocols import ExplanationSet
from cratescope.explain.terms.features import Lexicon
from cratescope.explain.terms.fit import AT_ONCE, Skipped, explain, identity
from cratescope.explain.terms.language import load_language
from cratescope.explain.terms.phrases import written
from cratescope.explain.terms.texts import Vocabulary
from cratescope.neurons.records import NeuronId, NeuronRecord
from cratescope.run import Run
from cratescope.text.tokenizer import vocabulary_strings


class ByTerms:
    """Terms are chosen on windows that no protocol uses, so that all explanation sets have the same of a neuron."""

    batch = AT_ONCE

    def __init__(self, config: TermsConfig, run: Run) -> None:
        self._config, self._lexicon = config, Lexicon(load_language(config.language))
        self._vocabulary = Vocabulary.of(vocabulary_strings(run.tokenizer))
        self._known: dict[NeuronId, Explanation] = {}

    def made_with(self, chosen: ExplanationSet) -> dict[str, Any]:
        return identity(self._config, self._lexicon.language)

    def explained(
        self, chosen: ExplanationSet, records: Sequence[NeuronRecord]
    ) -> list[tuple[Explanation, UserError | None]]:
        new = [record for record in records if record.neuron not in self._known]
        language = self._lexicon.language
        for record, found in zip(new, explain(new, self._vocabulary, self._lexicon, self._config), strict=True):
            text, reason = ("", found.reason) if isinstance(found, Skipped) else (written(found), None)
            one = Explanation(record.neuron, text, TERMS, f"{language.name} {language.version}", reason)
            self._known[record.neuron] = one
        return [(self._known[record.neuron], None) for record in records]
