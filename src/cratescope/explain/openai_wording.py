"""The exact prompts and few-shot examples of OpenAI (Bills et al. 2023), from `automated-interpretability`.

Nothing of that package is copied here: its own code writes the prompts. What it imports beside them (an HTTP client,
blob storage, a tokenizer that downloads) is replaced by empty modules meanwhile, so none of it has to be installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from cratescope.errors import UserError
from cratescope.explain.shown import Shown
from cratescope.explain.slots import SlotPrompt, fill_in
from cratescope.llm.interface import LanguageModel

PACKAGE = "neuron_explainer"
_CLIENT = f"{PACKAGE}.api_client"
_NOT_NEEDED = ("blobfile", "boostedblob", "httpx", "orjson", "tiktoken", _CLIENT)
_ROOM = 60


class OpenAIWording:
    """Prompts as plain text (the package's format without special tokens), to which a completion is written."""

    def __init__(self, explainer: Any, simulator: Any, record: type, version: str) -> None:
        self._explainer, self._simulator, self._record = explainer, simulator, record
        self.explain_version = self.slots_version = version
        self._explain_prefix = _shared(self._explain_text([[token], [1.0]]) for token in "ab")
        self._slots_prefix = _shared(self._slots_text(explanation, ["a"]) for explanation in "ab")

    @classmethod
    @functools.cache
    def load(cls) -> OpenAIWording:
        """Raises UserError when the package is not installed."""
        if importlib.util.find_spec(PACKAGE) is None:
            raise UserError(
                "--prompts openai: automated-interpretability is not installed; "
                "`pip install --no-deps automated-interpretability==0.0.24`, or use --prompts own"
            )
        with _stand_ins():
            explainer, simulator, builder, activations, examples = (
                importlib.import_module(f"{PACKAGE}.{name}")
                for name in (
                    *("explanations.explainer", "explanations.simulator", "explanations.prompt_builder"),
                    *("activations.activations", "explanations.few_shot_examples"),
                )
            )
        shared = {
            "prompt_format": builder.PromptFormat.NONE,
            "few_shot_example_set": examples.FewShotExampleSet.ORIGINAL,
            "repeat_non_zero_activations": True,
            "context_size": explainer.ContextSize.ONETWENTYEIGHT_K,
            # It would use a downloaded tokenizer; our models refuse prompts that are too long themselves.
            "_prompt_is_too_long": lambda *_: False,
        }
        writes = explainer.TokenActivationPairExplainer, simulator.ExplanationNeuronSimulator
        explains, simulates = (kind.__new__(kind) for kind in writes)
        for one in (explains, simulates):
            vars(one).update(shared)
        version = f"openai-{metadata.version('automated-interpretability')}"
        return cls(explains, simulates, activations.ActivationRecord, version)

    def explain_prefix(self) -> str:
        return self._explain_prefix

    def explain_prompt(self, shown: Sequence[Shown], maximum: float) -> str:
        """Ask for an explanation; `maximum` is unused, because the package takes that of the shown windows."""
        rows = [[item.tokens, item.activations.tolist()] for item in shown]
        if not any(value > 0 for _, values in rows for value in values):
            return ""
        return self._explain_text(*rows).removeprefix(self._explain_prefix)

    def slots_prefix(self, llm: LanguageModel) -> list[int]:
        return llm.encode(self._slots_prefix)

    def slot_prompt(self, llm: LanguageModel, explanation: str, tokens: Sequence[str]) -> SlotPrompt:
        """Raises AssertionError when the package writes its lines in another way than `token<TAB>unknown`."""
        lines = "\n".join(f"{token}\tunknown" for token in tokens)
        head, found, _ = self._slots_text(explanation, tokens).removeprefix(self._slots_prefix).rpartition(lines)
        if not found:
            raise AssertionError(f"{self.slots_version} has another format")
        return fill_in(llm, head, tokens)

    def _explain_text(self, *rows: list[Any]) -> str:
        records = [self._record(tokens=tokens, activations=values) for tokens, values in rows]
        return self._explainer.make_explanation_prompt(
            all_activation_records=records, max_activation=0.0, max_tokens_for_completion=_ROOM
        )

    def _slots_text(self, explanation: str, tokens: Sequence[str]) -> str:
        self._simulator.explanation = explanation
        return self._simulator.make_simulation_prompt(list(tokens))


def _shared(texts: Iterator[str]) -> str:
    """The complete lines that all texts start with."""
    common = os.path.commonprefix(list(texts))
    return common[: common.rindex("\n") + 1]


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Import the package with empty stand-in modules, leaving no trace: later imports get the real ones."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name in _NOT_NEEDED or name.partition(".")[0] == PACKAGE]

    kept = {name: sys.modules.pop(name) for name in ours()}
    for name in _NOT_NEEDED:
        sys.modules[name] = types.ModuleType(name)
        # Some of them decorate functions of the package.
        vars(sys.modules[name])["__getattr__"] = lambda _: lambda function: function
    vars(sys.modules[_CLIENT])["ApiClient"] = type("ApiClient", (), {"BASE_API_URL": ""})
    try:
        yield
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)
