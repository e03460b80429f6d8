"""Every subcommand: its settings, the function that does it, and what --help says of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from cratescope import config as settings


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
    "prepare": Stage(settings.PrepareConfig, "lm.data:prepare", "Turn text into tokenised shards, split by document."),
    "train": Stage(settings.TrainConfig, "lm.train:train", "Train one language model with the paper's recipe."),
    "evaluate": Stage(settings.EvaluateConfig, "lm.evaluate:evaluate", "Measure loss and bits per byte on any text."),
    "collect": Stage(settings.CollectConfig, "neurons.collect:collect", "Read text and write what every neuron does."),
    "explain": Stage(settings.ExplainConfig, "neurons.explain:explain", "Ask an LLM for one phrase per neuron."),
    "simulate": Stage(settings.SimulateConfig, "neurons.simulate:simulate", "Predict activations from explanations."),
    "judge": Stage(settings.JudgeConfig, "neurons.judge:judge", "Ask an LLM about whole windows instead."),
    "score": Stage(settings.ScoreConfig, "neurons.score:score", "Compare predicted and true activations."),
    "show": Stage(settings.ShowConfig, "report.card:neuron_card", "Print all that is known of one neuron."),
    "report": Stage(settings.ReportConfig, "report.report:report", "Write one HTML page about some runs."),
    "study": Stage(settings.StudyConfig, "study:study", "Do all of this for the models of one TOML file."),
    "export": Stage(settings.ExportConfig, "neurons.exchange:export", "Write records in another tool's format."),
    "import": Stage(
        settings.ImportConfig, "neurons.exchange:import_records", "Read records of another tool into a run."
    ),
    "convert": Stage(
        settings.ConvertConfig, "models.convert:convert", "Turn the authors' checkpoint into ours, or back."
    ),
}
