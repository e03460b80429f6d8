"""OpenAI's prompts, parsing and score are theirs: against the package itself, in an environment of its own (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cratescope.explain.simulators.all_at_once import expected_value
from cratescope.score.measures import measure

PYTHON = os.environ.get("AUTOMATED_INTERPRETABILITY_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="AUTOMATED_INTERPRETABILITY_PYTHON names no python that has the package"),
]

WINDOWS = [
    {"tokens": ["The", " cat", " ate", "\n", "\t", " fish"], "activations": [0.0, 3.5, -1.0, 0.2, 0.0, 0.0]},
    {"tokens": [" cat"] + [" x"] * 9, "activations": [7.0] + [0.0] * 9},
]
EXPLANATION = "words about cats"

THEIRS = """
import json, sys
from neuron_explainer.activations.activations import ActivationRecord
from neuron_explainer.explanations.explainer import TokenActivationPairExplainer
from neuron_explainer.explanations.prompt_builder import PromptFormat
from neuron_explainer.explanations.simulator import ExplanationNeuronSimulator
windows, explanation = json.load(sys.stdin)
explainer = TokenActivationPairExplainer("none", prompt_format=PromptFormat.NONE)
explainer._prompt_is_too_long = lambda *_: False  # it would download a tokenizer
simulator = ExplanationNeuronSimulator("none", explanation, prompt_format=PromptFormat.NONE)
explained = explainer.make_explanation_prompt(
    all_activation_records=[ActivationRecord(**window) for window in windows],
    max_activation=1.0,
    max_tokens_for_completion=60,
)
print(json.dumps([explained, *(simulator.make_simulation_prompt(window["tokens"]) for window in windows)]))
"""

OURS = """
import json, sys
import numpy as np
from scripted import ScriptedLLM
from cratescope.explain.openai_wording import OpenAIWording
from cratescope.explain.shown import Shown
windows, explanation = json.load(sys.stdin)
wording, llm = OpenAIWording.load(), ScriptedLLM()
shown = [Shown(window["tokens"], np.array(window["activations"])) for window in windows]
slots = [wording.slot_prompt(llm, explanation, window["tokens"]) for window in windows]
for window, item in zip(windows, slots):
    for token, slot in zip(window["tokens"], item.slots, strict=True):
        assert llm.decode(item.ids[:slot]).endswith(token + chr(9)), token
prefix = wording.slots_prefix(llm)
told = [wording.explain_prefix() + wording.explain_prompt(shown, 1.0)]
print(json.dumps([*told, *(llm.decode([*prefix, *item.ids]) for item in slots)]))
assert not {"neuron_explainer", "tiktoken", "httpx"} & set(sys.modules)
"""

PARSED = """
import json, sys
from neuron_explainer.explanations.scoring import correlation_score
from neuron_explainer.explanations.simulator import compute_predicted_activation_stats_for_token
tops, truths, simulated = json.load(sys.stdin)
values = [float(compute_predicted_activation_stats_for_token(top)[1]) for top in tops]
print(json.dumps([values, [float(correlation_score(a, b)) for a, b in zip(truths, simulated)]]))
"""


def asked(python: str, code: str, given: Any, **environment: str) -> Any:
    done = subprocess.run(
        [python, "-c", code], input=json.dumps(given), capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_prompts_are_the_packages_byte_for_byte_without_its_requirements(tmp_path: Path) -> None:
    where = "import json, neuron_explainer; print(json.dumps(neuron_explainer.__path__[0]))"
    package = Path(asked(PYTHON, where, None))
    for source in (package, *package.parent.glob("automated_interpretability-*.dist-info")):
        (tmp_path / source.name).symlink_to(source)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    theirs = asked(PYTHON, THEIRS, [WINDOWS, EXPLANATION])
    ours = asked(sys.executable, OURS, [WINDOWS, EXPLANATION], PYTHONPATH=paths)
    assert ours[0] == theirs[0]
    for mine, whole in zip(ours[1:], theirs[1:], strict=True):
        # What stands behind the last slot is not read.
        assert whole.startswith(mine) and len(whole) - len(mine) < 10


def test_expected_values_and_scores_are_the_packages() -> None:
    random = np.random.default_rng(0)
    logprobs = random.normal(-3, 2, (200, 11))
    tops = [{str(value): x for value, x in enumerate(row)} | {"unknown": -0.1} for row in logprobs.tolist()]
    truths, simulated = random.exponential(1, (20, 64)), random.exponential(1, (20, 64))
    values, scores = asked(PYTHON, PARSED, [tops, truths.tolist(), simulated.tolist()])
    np.testing.assert_allclose(expected_value(logprobs), values, rtol=0, atol=1e-9)
    ours = [measure("pearson", a, b) for a, b in zip(truths, simulated, strict=True)]
    np.testing.assert_allclose(ours, scores, rtol=0, atol=1e-9)


def test_the_correction_of_a_split_ten_is_what_differs() -> None:
    """A simulator sure of 10 that spells it 1, 0: the package reads the 1 that comes first."""
    one, ten = np.log(0.95), np.log(0.95 * 0.99)
    rest = np.log([1e-3] * 9)
    logprobs = np.array([[rest[0], one, *rest[1:], ten]])
    seen = {str(value): float(x) for value, x in enumerate(logprobs[0, :10])}
    (theirs,), _ = asked(PYTHON, PARSED, [[seen], [], []])
    assert theirs < 1.1
    assert expected_value(logprobs, split=True)[0] > 9.8
