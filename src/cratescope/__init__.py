"""cratescope: can the neurons of a language model be understood, and does a white-box architecture help?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cratescope.arm import Arm as Arm
    from cratescope.errors import UserError as UserError
    from cratescope.explain.explain import explain as explain_neurons
    from cratescope.explain.simulate import simulate as simulate_neurons
    from cratescope.models.folder import load_folder as load_model
    from cratescope.neurons.collect import collect as collect_records
    from cratescope.neurons.records import NeuronId as NeuronId
    from cratescope.neurons.records import NeuronRecord as NeuronRecord
    from cratescope.neurons.steer import Edit as Edit
    from cratescope.neurons.steer import steered as steered
    from cratescope.results.neuron import Neuron as Neuron
    from cratescope.results.runs import load_results as load_results
    from cratescope.run import Run as Run
    from cratescope.score.score import score as score_neurons
    from cratescope.score.scores import Score as Score
    from cratescope.text.tokenizer import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

# Imported when first asked for, so that `import cratescope` is instant. The stages are not called by the bare name of
# their subcommand: a room of the package may have that name.
_PUBLIC = {
    "Arm": "arm:Arm",
    "Edit": "neurons.steer:Edit",
    "Neuron": "results.neuron:Neuron",
    "NeuronId": "neurons.records:NeuronId",
    "NeuronRecord": "neurons.records:NeuronRecord",
    "Run": "run:Run",
    "Score": "score.scores:Score",
    "UserError": "errors:UserError",
    "collect_records": "neurons.collect:collect",
    "explain_neurons": "explain.explain:explain",
    "load_model": "models.folder:load_folder",
    "load_results": "results.runs:load_results",
    "load_tokenizer": "text.tokenizer:load_tokenizer",
    "score_neurons": "score.score:score",
    "simulate_neurons": "explain.simulate:simulate",
    "steered": "neurons.steer:steered",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
