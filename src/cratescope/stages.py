"""Every subcommand: its settings, the function that does it, and what --help says of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from cratescope.config import StudyConfig, ZooConfig
from cratescope.exchange.config import ConvertConfig, ExportConfig, ImportConfig
from cratescope.explain.config import ExplainConfig, JudgeConfig, LanguageConfig, SimulateConfig
from cratescope.lm.config import EvaluateConfig, TrainConfig
from cratescope.neurons.config import CollectConfig, EffectsConfig, SteerConfig
from cratescope.report.config import ReportConfig, ShowConfig
from cratescope.sae.config import SaeConfig
from cratescope.score.config import ScoreConfig
from cratescope.text.config import PrepareConfig
from cratescope.viewer.config import ViewConfig


class Stage(NamedTuple):
    """A subcommand: its class of settings, "module:function", and one line."""

    config: type
    function: str
    line: str

    def load(self) -> Callable[[Any], Any]:
        """The function, which takes the settings; only now its module is imported, so that --help is instant."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"cratescope.{module}"), name)


STAGES: dict[str, Stage] = {
    "prepare": Stage(PrepareConfig, "text.prepare:prepare", "Turn text into tokenised shards, split by document."),
    "train": Stage(TrainConfig, "lm.train:train", "Train one language model with the paper's recipe."),
    "evaluate": Stage(EvaluateConfig, "sae.quality:evaluate", "Measure loss on any text, and dictionaries."),
    "sae": Stage(SaeConfig, "sae.train:train_coders", "Learn sparse dictionaries of a model's activations."),
    "collect": Stage(CollectConfig, "neurons.collect:collect", "Read text and write what every neuron does."),
    "effects": Stage(EffectsConfig, "neurons.affect:effects", "Say which tokens every neuron raises and lowers."),
    "explain": Stage(ExplainConfig, "explain.explain:explain", "Say what each neuron finds."),
    "simulate": Stage(SimulateConfig, "explain.simulate:simulate", "Predict activations from explanations."),
    "judge": Stage(JudgeConfig, "explain.judge:judge", "Ask an LLM about whole windows instead."),
    "score": Stage(ScoreConfig, "score.score:score", "Compare predicted and true activations."),
    "terms": Stage(LanguageConfig, "explain.terms.language:print_language", "List what explanations by terms may say."),
    "show": Stage(ShowConfig, "report.card:neuron_card", "Print all that is known of one neuron."),
    "steer": Stage(SteerConfig, "report.steering:steer", "Force neurons and read what the model then says."),
    "view": Stage(ViewConfig, "viewer.server:view", "Look around in runs in the browser: neurons, text, steering."),
    "report": Stage(ReportConfig, "report.report:report", "Write one HTML page about some runs."),
    "study": Stage(StudyConfig, "study:study", "Do all of this for the models of one TOML file."),
    "zoo": Stage(ZooConfig, "zoo:listing", "List the trained models that come with cratescope."),
    "export": Stage(ExportConfig, "exchange.export:export", "Write records in another tool's format."),
    "import": Stage(ImportConfig, "exchange.imports:import_records", "Read records of another tool into a run."),
    "convert": Stage(ConvertConfig, "exchange.reference:convert", "Turn the authors' checkpoint into ours, or back."),
}
