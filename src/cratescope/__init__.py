"""cratescope: can the neurons of a language model be understood, and does a white-box architecture help?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cratescope import config as config
    from cratescope.arm import Arm as Arm
    from cratescope.lm.tokenizer import load_tokenizer as load_tokenizer
    from cratescope.models.convert import load_folder as load_model
    from cratescope.neurons.collect import collect as collect_records
    from cratescope.neurons.explain import explain as explain_neurons
    from cratescope.neurons.records import NeuronId as NeuronId
    from cratescope.neurons.records import NeuronRecord as NeuronRecord
    from cratescope.neurons.records import Score as Score
    from cratescope.neurons.score import score as score_neurons
    from cratescope.neurons.simulate import simulate as simulate_neurons
    from cratescope.results.neuron import Neuron as Neuron
    from cratescope.results.runs import load_results as load_results
    from cratescope.run import Run as Run
    from cratescope.run import UserError as UserError

__version__ = "0.1.0"

# Imported when first asked for, so that `import cratescope` is instant. The stages are not called by the bare name of
# their subcommand: a room of the package may have that name.
_PUBLIC = {
    "Arm": "arm:Arm",
    "Neuron": "results.neuron:Neuron",
    "NeuronId": "neurons.records:NeuronId",
    "NeuronRecord": "neurons.records:NeuronRecord",
    "Run": "run:Run",
    "Score": "neurons.records:Score",
    "UserError": "run:UserError",
    "collect_records": "neurons.collect:collect",
    "config": "config:",
    "explain_neurons": "neurons.explain:explain",
    "load_model": "models.convert:load_folder",
    "load_results": "results.runs:load_results",
    "load_tokenizer": "lm.tokenizer:load_tokenizer",
    "score_neurons": "neurons.score:score",
    "simulate_neurons": "neurons.simulate:simulate",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = import_module(f"{__name__}.{module}")
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
